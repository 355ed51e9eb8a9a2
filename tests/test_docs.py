"""The documentation says what the code does: its tables are generated from the code's, or run, its requests are read.

Tables after `<!-- name -->` are generated: where one differs, the failure prints it as it should be. Those after
`<!-- language: texts -->` and `<!-- language: refused -->` are run row by row, against our own automata and parser.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import jsonschema_specifications  # type: ignore[import-untyped]
import pytest

from cadenza.decoding.constraints import compiler, llguidance_grammar
from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.compiled import CompiledFinite
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.schema import formats, keywords, strict
from cadenza.decoding.constraints.spec import ConstraintSpec, Kind
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.wire import parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "constraints.md").read_text(encoding="utf-8")
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b""], [256])
PATIENT = Limits(max_seconds=20.0)
"""So that a slow machine passes, too."""

MARKED = re.compile(r"<!-- (.+) -->\n((?:\S.*\n?|\n(?=\|))*)")
CODE = re.compile(r"`([^`]+)`")

SPECS: dict[str, Callable[[str], ConstraintSpec]] = {
    "schema": ConstraintSpec.json_schema,
    "regex": ConstraintSpec.regex,
    "lark": ConstraintSpec.grammar,
    "gbnf": ConstraintSpec.grammar,
    "tag": lambda text: ConstraintSpec.structural_tag({"type": "structural_tag", "format": json.loads(text)}),
}


def _rows(kind: str) -> list[tuple[str, list[str]]]:
    """(language, cells) of each row of the tables that are run."""
    rows = []
    for name, table in MARKED.findall(PAGE):
        language, _, what = name.partition(": ")
        if what == kind:
            lines = table.splitlines()[2:]
            cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
            assert cells, f"no table after {name}"
            rows += [(language, row) for row in cells]
    assert rows
    return rows


def _codes(cell: str) -> list[str]:
    return [code.replace("\\|", "|").replace("⏎", "\n") for code in CODE.findall(cell)]


def _is_in(spec: ConstraintSpec, texts: Iterable[str]) -> list[bool]:
    compiled = compile_spec(spec, BYTES, Effort(PATIENT))
    if isinstance(compiled, CompiledFinite):
        dfa = compiled.automaton.dfa
        return [dfa.accepts(text.encode()) for text in texts]
    parsers = [(Parser(compiled.grammar), text.encode()) for text in texts]
    return [parser.advance(text) and parser.is_complete for parser, text in parsers]


@pytest.mark.parametrize(("language", "row"), _rows("texts"))
def test_texts_belong_to_a_constraint_as_the_tables_say(language: str, row: list[str]) -> None:
    (source,), inside, outside = map(_codes, row)
    assert inside
    assert outside
    found = _is_in(SPECS[language](source), [*inside, *outside])
    assert found == [True] * len(inside) + [False] * len(outside)


@pytest.mark.parametrize(("language", "row"), _rows("refused"))
def test_constraints_are_refused_in_the_words_of_the_tables(language: str, row: list[str]) -> None:
    (source,) = _codes(row[0])
    with pytest.raises(ConstraintError, match=re.escape(row[1])):
        compile_spec(SPECS[language](source), BYTES, Effort(PATIENT))


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _keywords() -> str:
    conditions = [name for name, note in keywords.ENFORCED.items() if note]
    plain = [name for name in keywords.ENFORCED if name not in conditions]
    return (
        "| Keywords | |\n|---|---|\n"
        f"| {_named(plain)} | enforced |\n"
        f"| {_named(conditions)} | enforced, with what the tables below say |\n"
        f"| {_named(sorted(keywords.ANNOTATIONS))} | annotations, definitions and names: they restrict nothing |\n"
        f"| {_named(keywords.REFUSED)} | refused |\n"
    )


def _formats() -> str:
    return (
        "| Formats | |\n|---|---|\n"
        f"| {_named(formats.PATTERNS)} | enforced |\n"
        f"| {_named(sorted(formats.ANNOTATIONS))} | of numbers, or of nothing in the text: they restrict nothing |\n"
    )


def _strict() -> str:
    return _named(name for name in keywords.ENFORCED if name not in strict.FORBIDDEN) + ".\n"


def _tags() -> str:
    with pytest.raises(ConstraintError) as refused:
        compile_spec(SPECS["tag"]('{"type": "?"}'), BYTES, Effort())
    names = refused.value.message.partition("these are: ")[2].split(", ")
    assert "triggered_tags" in names
    return _named(names) + ".\n"


def _limits() -> str:
    limits = Limits()
    rows = {
        "max_source_bytes": ("Source", f"{limits.max_source_bytes // 1024} KiB"),
        "max_nesting": ("Nesting of groups, values, brackets", f"{limits.max_nesting} levels"),
        "max_states": ("States of one automaton", f"{limits.max_states}"),
        "max_rules": ("Rules of the grammar, counts written out", f"{limits.max_rules}"),
        "max_seconds": ("Time", f"{limits.max_seconds:g} s"),
        "max_memory_bytes": ("Memory", f"{limits.max_memory_bytes // 2**20} MiB"),
    }
    assert rows.keys() == {field.name for field in fields(limits)}
    lines = [
        *rows.values(),
        ("Rules and terminals of what llguidance is given", f"{llguidance_grammar._MAX_SYMBOLS}"),
        ("Kept results", f"{compiler._CACHE_ENTRIES}, together {compiler._CACHE_BYTES // 2**20} MiB"),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in lines)


GENERATED = {"keywords": _keywords, "formats": _formats, "strict": _strict, "tags": _tags, "limits": _limits}


@pytest.mark.parametrize("name", GENERATED)
def test_lists_are_those_of_the_code(name: str) -> None:
    assert dict(MARKED.findall(PAGE))[name] == GENERATED[name]()


def test_every_marked_table_is_checked() -> None:
    runs = {f"{language}: {what}" for language in SPECS for what in ("texts", "refused")}
    assert {name for name, _ in MARKED.findall(PAGE)} <= runs | GENERATED.keys()


def test_keywords_of_all_drafts_are_listed() -> None:
    listed = {*keywords.ENFORCED, *keywords.ANNOTATIONS, *keywords.REFUSED}
    known: set[str] = set()
    for name, resource in jsonschema_specifications.REGISTRY.items():
        if "draft-03" not in name:
            known.update(resource.contents.get("properties", {}))
    assert len(known) > 50
    assert known <= listed


@pytest.mark.parametrize("name", [name for name, note in keywords.ENFORCED.items() if note])
def test_what_is_particular_about_a_keyword_is_shown(name: str) -> None:
    assert any(f'"{name}"' in row[0] for kind in ("texts", "refused") for _, row in _rows(kind))


REQUESTS = re.findall(r"curl \S*/v1/(\S+) [^']*'([^']+)'", PAGE)


def _spec(route: str, body: str) -> ConstraintSpec:
    kind: Any = ChatRequest if route == "chat/completions" else CompletionRequest
    spec = parse(kind, body.encode()).constraint_spec
    assert isinstance(spec, ConstraintSpec)
    return spec


@pytest.mark.parametrize(("route", "body"), REQUESTS)
def test_requests_can_be_served(route: str, body: str) -> None:
    compile_spec(_spec(route, body), BYTES, Effort(PATIENT))


def test_each_kind_of_constraint_has_a_request() -> None:
    assert {_spec(route, body).kind for route, body in REQUESTS} == set(get_args(Kind))


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)]
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link.partition("#")[0]).exists()] == []
