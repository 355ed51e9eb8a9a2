"""Matchers under a sampler that draws any token of the mask: always complete in time, always valid.

The truth is `lark`, `jsonschema` and `re`. Compiled here rather than in a worker process.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import lark
import pytest

from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.matcher import GrammarMatcher, Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel

from .sampling import SMALL, adversarial, allowed, budgets, constraint_of

DATA = Path(__file__).parents[2] / "data" / "constraints"
GRAMMARS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.lark"))}
SCHEMAS: dict[str, Any] = {
    "ticket": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 30},
            "priority": {"enum": ["low", "medium", "high"]},
            "hours": {"type": "integer", "minimum": 1, "maximum": 80},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3, "uniqueItems": False},
        },
        "required": ["title", "priority", "hours"],
        "additionalProperties": False,
    },
    "forced": {
        "type": "object",
        "properties": {"a_rather_long_name_of_a_property": {"const": "a constant with é, 日本 and 🎵"}},
        "required": ["a_rather_long_name_of_a_property"],
        "additionalProperties": False,
    },
    "any": True,
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {"type": "object", "properties": {"children": {"items": {"$ref": "#/$defs/node"}}}}
        },
    },
}
SPECS = {
    **{name: ConstraintSpec.grammar(text) for name, text in GRAMMARS.items()},
    **{name: ConstraintSpec.json_schema(schema) for name, schema in SCHEMAS.items()},
    "words": ConstraintSpec.regex(r"([a-zé]+ ){2,5}[a-zé]+[.!?]"),
    "stamp": ConstraintSpec.regex(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?Z"),
    "options": ConstraintSpec.choice(["yes", "yes, sir", "no", "no, thank you", "vielleicht später"]),
}


@cache
def named(name: str, tables: TokenTables) -> Constraint:
    return constraint_of(SPECS[name], tables, max_seconds=30.0)


def check(name: str, text: str) -> None:
    if name in GRAMMARS:
        parser_of(name).parse(text)  # raises where it does not
    elif name in SCHEMAS:
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(text))
    elif name == "options":
        assert text in json.loads(SPECS[name].source)
    else:
        assert re.fullmatch(SPECS[name].source, text)


@cache
def parser_of(name: str) -> lark.Lark:
    return lark.Lark(GRAMMARS[name], parser="earley", lexer="dynamic_complete")


@pytest.mark.parametrize("name", SPECS)
def test_complete_and_valid_at_every_budget(real_tables: TokenTables, name: str) -> None:
    constraint, rng = named(name, real_tables), random.Random(name)
    for budget in budgets(constraint):
        check(name, adversarial(constraint, budget, rng))


@pytest.mark.parametrize("name", SPECS)
def test_complete_and_valid_with_few_tokens_to_choose_from(name: str) -> None:
    """Every byte is a token here, and few are more than that: budgets are tight in another way."""
    constraint, rng = named(name, SMALL), random.Random(name)
    for budget in budgets(constraint) * 2:
        check(name, adversarial(constraint, budget, rng))


@pytest.mark.parametrize("name", SPECS)
def test_the_tightest_budget_is_kept_from_wherever_one_is(real_tables: TokenTables, name: str) -> None:
    """In the middle of a text nobody cares for the budget; then it is cut to the least that can do."""
    constraint, rng = named(name, real_tables), random.Random(name)
    vocabulary = real_tables.vocabulary
    for length in (1, 3, 7):
        matcher, tokens = constraint.matcher(), list[int]()
        while len(tokens) < length and not (tokens and matcher.is_ended):
            candidates = set(allowed(matcher, vocabulary, 10**6)) - set(vocabulary.eos_ids)
            if not candidates:
                break
            tokens.append(matcher.accept(rng.choice(sorted(candidates)), 10**6))
        left = least_tokens(matcher)
        for extra in range(2):
            here, written = matcher.fork(), list(tokens)
            remaining = left + extra
            while remaining > 0 and not here.is_ended:
                chosen = here.accept(rng.choice(allowed(here, vocabulary, remaining)), remaining)
                if chosen in vocabulary.eos_ids:
                    break
                written.append(chosen)
                remaining -= 1
            assert here.is_complete
            check(name, b"".join(vocabulary.tokens[token_id] for token_id in written).decode())


def least_tokens(matcher: Any) -> int:
    """As the matcher knows it: exact for finite constraints, tokens of the fewest bytes for others."""
    if not isinstance(matcher, GrammarMatcher):
        return int(matcher.min_tokens)
    tokens = matcher.vocabulary.segment(matcher.parser.completion())
    assert tokens is not None
    return len(tokens)


# what the matcher decides


def vocabulary_of(*tokens: bytes) -> TokenTables:
    vocabulary = Vocabulary([*tokens, b"</s>"], [len(tokens)])
    return TokenTables(vocabulary, vocabulary.segment)


def test_a_complete_text_is_ended_where_what_the_model_adds_has_no_room_to_end() -> None:
    tables = vocabulary_of(b"a", b"(", b")", b",")
    matcher = constraint_of(
        ConstraintSpec.grammar('start: item ("," item)*\nitem: "a" | "(" start ")"'), tables
    ).matcher()
    assert matcher.accept(0, 4) == 0
    assert (matcher.is_complete, matcher.is_ended, matcher.limited) == (True, False, False)
    fork = matcher.fork()
    assert allowed(matcher, tables.vocabulary, 1) == [3, 4]
    assert matcher.accept(3, 1) == 4, "a comma would ask for another item"
    assert matcher.limited
    assert fork.accept(3, 2) == 3
    assert fork.accept(1, 1) == 0, "an opening bracket would never be closed"
    assert (fork.is_complete, fork.limited) == (True, True)


def test_an_end_that_the_budget_left_as_the_only_choice_is_the_budgets() -> None:
    tables = vocabulary_of(b"a", b"b", b"c", b"d")
    constraint = constraint_of(ConstraintSpec.regex("a(bcd)?"), tables)
    for budget, expected in ((3, [4]), (4, [1, 4])):
        matcher = constraint.matcher()
        matcher.accept(0, budget)
        assert allowed(matcher, tables.vocabulary, budget - 1) == expected
        assert matcher.accept(4, budget - 1) == 4
        assert matcher.limited == (budget == 3)


def test_what_the_mask_forbids_is_an_error_and_changes_nothing_else() -> None:
    tables = vocabulary_of(b"a", b"b", b"ab", b"c")
    matcher = constraint_of(ConstraintSpec.grammar('start: "a" start "b" | "c"'), tables).matcher()
    with pytest.raises(MatcherError, match="token 1"):
        matcher.fork().accept(1, 9)
    assert allowed(matcher, tables.vocabulary, 9) == [0, 3]
    assert matcher.accept(3, 9) == 3
    assert matcher.is_ended
    assert allowed(matcher, tables.vocabulary, 9) == [4]


@pytest.mark.parametrize("name", ["ticket", "json", "sql", "tree", "words"])
def test_forks_go_their_own_ways(real_tables: TokenTables, name: str) -> None:
    """Branches of one answer, advanced in turns, do as each would alone."""
    constraint, vocabulary = named(name, real_tables), real_tables.vocabulary

    def go_on(matcher: Matcher, seed: int) -> Iterator[int]:
        rng = random.Random(seed)
        for remaining in range(24, 0, -1):
            if matcher.is_ended:
                return
            chosen = matcher.accept(rng.choice(allowed(matcher, vocabulary, remaining)), remaining)
            yield chosen
            if chosen in vocabulary.eos_ids:
                return

    alone = [list(go_on(constraint.matcher(), seed)) for seed in range(4)]
    root = constraint.matcher()
    allowed(root, vocabulary, 24)
    forks = [go_on(fork, seed) for seed, fork in enumerate([root.fork() for _ in range(3)])] + [
        go_on(root, 3)
    ]
    together: list[list[int]] = [[] for _ in forks]
    unfinished = set(range(4))
    while unfinished:
        for place in sorted(unfinished):
            token_id = next(forks[place], None)
            if token_id is None:
                unfinished.discard(place)
            else:
                together[place].append(token_id)
    assert together == alone


@pytest.mark.parametrize("name", ["forced", "ticket", "stamp", "options", "keywords", "sql"])
def test_a_run_of_forced_tokens_is_what_the_masks_force(real_tables: TokenTables, name: str) -> None:
    """Each byte of it is the only one possible, it never exceeds the budget, and there are such runs."""
    constraint, vocabulary, rng = named(name, real_tables), real_tables.vocabulary, random.Random(name)
    num_forced = 0
    for budget in budgets(constraint):
        matcher, tokens = constraint.matcher(), list[int]()
        while len(tokens) < budget and not (tokens and matcher.is_ended):
            before, remaining = matcher.fork(), budget - len(tokens)
            run = matcher.forced(remaining)
            assert len(run) <= remaining
            text = b"".join(vocabulary.tokens[token_id] for token_id in run)
            for place in range(len(text)):
                first = {
                    vocabulary.tokens[token_id][:1]
                    for token_id in allowed(stepped(before, text[:place], vocabulary), vocabulary, 10**6)
                }
                assert first == {text[place : place + 1]}
            for token_id in run:
                assert before.accept(token_id, remaining) == token_id
                remaining -= 1
            assert before.is_complete == matcher.is_complete
            tokens += run
            num_forced += len(run)
            if remaining == 0 or matcher.is_ended:
                break
            tokens.append(matcher.accept(rng.choice(allowed(matcher, vocabulary, remaining)), remaining))
            if tokens[-1] in vocabulary.eos_ids:
                break
        assert matcher.is_complete
    assert num_forced or name in ("options", "keywords")


def stepped(matcher: Matcher, text: bytes, vocabulary: Vocabulary) -> Matcher:
    """Byte by byte, as far as bytes are tokens."""
    fork = matcher.fork()
    for token_id in vocabulary.segment(text) or []:
        assert fork.accept(token_id, 10**6) == token_id
    return fork


TEXTS = {
    "ticket": '{"title": "Ünïcode 日本 🎵 \\" \\u001f", "priority": "medium", "hours": 42, "tags": ["a b", ""]}',
    "any": '[1.5e-3, {"key": null, "é": [true, false]}, "x\\n"]',
    "json": '{"a": [1, {"b": "c d"}]}',
    "words": "the lower été is here!",
    "stamp": "2024-02-29T23:59:60Z",
    "options": "vielleicht später",
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_tokenization_of_a_legal_text_is_accepted(real_tables: TokenTables, name: str) -> None:
    """Also cuts that the tokenizer would never make, through the middle of characters."""
    text, vocabulary, rng = TEXTS[name].encode(), real_tables.vocabulary, random.Random(name)
    ids: dict[bytes, list[int]] = {}
    for token_id, token in enumerate(vocabulary.tokens):
        ids.setdefault(token, []).append(token_id)
    for number in range(12):
        matcher, place = named(name, real_tables).matcher(), 0
        while place < len(text):
            lengths = [size for size in range(1, len(text) - place + 1) if text[place : place + size] in ids]
            length = min(lengths) if number == 0 else max(lengths) if number == 1 else rng.choice(lengths)
            token_id = rng.choice(ids[text[place : place + length]])
            assert token_id in allowed(matcher, vocabulary, 10**6), text[:place]
            assert matcher.accept(token_id, 10**6) == token_id
            place += length
        assert matcher.is_complete
        allowed(matcher, vocabulary, 1)


def test_added_and_special_tokens_never_come(smollm2: LoadedModel, real_tables: TokenTables) -> None:
    """Their texts are legal in JSON strings; as tokens they mean something else. Ends come where the text ends."""
    held_back = smollm2.tokenizer.special_ids | smollm2.tokenizer.added_ids
    assert len(held_back) > 3
    matcher = constraint_of(ConstraintSpec.json_schema({"type": "string"}), real_tables).matcher()
    for token_id in real_tables.vocabulary.segment(b'"anything <') or []:
        assert not held_back & set(allowed(matcher, real_tables.vocabulary, 10**6))
        matcher.accept(token_id, 10**6)
    assert not held_back & set(allowed(matcher, real_tables.vocabulary, 10**6))
    for special in held_back - set(real_tables.vocabulary.eos_ids):
        with pytest.raises(MatcherError):
            matcher.fork().accept(special, 10**6)
