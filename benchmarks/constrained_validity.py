"""How many constrained answers of a real model are complete and valid, at budgets from the least possible one up.

    python benchmarks/constrained_validity.py --schemas schemas.jsonl     # {"name", "schema"} on each line

Regexes and grammars are those of the tests. Temperature 1, one seed; answers are judged by others: `re` and `regex`,
lark's Earley parser, the `jsonschema` package. Constraints that are refused when compiled are counted apart.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import lark
import regex
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, RequestStream, SamplingParams
from cadenza.decoding.completion import collect
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.spec import ConstraintSpec

DATA = Path(__file__).parents[1] / "tests" / "data" / "constraints"


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    spec: ConstraintSpec
    is_valid: Callable[[str], bool]


def regex_cases() -> Iterator[Case]:
    def judge(pattern: str) -> Callable[[str], bool]:
        engine: Any = regex if r"\p" in pattern else re
        return lambda text: engine.fullmatch(pattern, text) is not None

    for pattern in (DATA / "regexes.txt").read_text(encoding="utf-8").splitlines():
        yield Case("regex", pattern, ConstraintSpec.regex(pattern), judge(pattern))


def grammar_cases() -> Iterator[Case]:
    def judge(grammar: str) -> Callable[[str], bool]:
        parser = lark.Lark(grammar, parser="earley", lexer="dynamic_complete")

        def is_valid(text: str) -> bool:
            try:
                parser.parse(text)
            except lark.exceptions.UnexpectedInput:
                return False
            return True

        return is_valid

    for path in sorted(DATA.glob("*.lark")):
        grammar = path.read_text(encoding="utf-8")
        yield Case("grammar", path.stem, ConstraintSpec.grammar(grammar), judge(grammar))


def schema_cases(file: Path) -> Iterator[Case]:
    def judge(schema: Any) -> Callable[[str], bool]:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator = kind(schema, format_checker=kind.FORMAT_CHECKER)

        def is_valid(text: str) -> bool:
            try:
                return bool(validator.is_valid(json.loads(text)))
            except ValueError:
                return False

        return is_valid

    for line in file.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        yield Case("schema", case["name"], ConstraintSpec.json_schema(case["schema"]), judge(case["schema"]))


def submit(engine: Engine, case: Case, budgets: list[int]) -> list[tuple[Case, int, RequestStream]]:
    constraint = engine.constraints.compile(case.spec).result()
    least = max(constraint.min_tokens, 1)
    messages = [{"role": "user", "content": f"Give me an example of {case.kind} {case.name[:80]}."}]
    prompt = tuple(engine.tokenizer.encode(engine.tokenizer.render_chat(messages), add_special_tokens=False))
    return [
        (
            case,
            budget,
            engine.submit(
                GenerationRequest(
                    request_id=f"{case.name} {budget}",
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=budget, temperature=1.0, seed=budget),
                    constraint=constraint,
                )
            ),
        )
        for budget in sorted({least, least + 1, *(budget for budget in budgets if budget >= least)})
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--schemas", type=Path)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 32, 256])
    options = parser.parse_args()
    console = Console()
    cases = [*regex_cases(), *grammar_cases(), *(schema_cases(options.schemas) if options.schemas else ())]
    counts: dict[str, Counter[str]] = {case.kind: Counter() for case in cases}
    start, num_tokens = time.perf_counter(), 0
    with Engine.load(options.model, config=EngineConfig(max_num_seqs=32, max_queue=100_000)) as engine:
        running = []
        for case in cases:
            counts[case.kind]["constraints"] += 1
            try:
                running += submit(engine, case, options.budgets)
            except ConstraintError as error:
                counts[case.kind]["refused"] += 1
                console.print(f"[dim]refused: {case.name}: {error}[/dim]", highlight=False)
        for case, budget, stream in track(running, "answers", console=console):
            choice = collect(stream, 1).choices[0]
            num_tokens += len(choice.token_ids)
            count = counts[case.kind]
            count["answers"] += 1
            count["forced"] += choice.num_forced_tokens
            count["tokens"] += len(choice.token_ids)
            count["closed early"] += choice.closed_early is True
            if case.is_valid(choice.text) and len(choice.token_ids) <= budget:
                count["valid"] += 1
            else:
                console.print(f"INVALID: {case.name} at {budget}: {choice.text!r}", markup=False)
    columns = ("constraints", "refused", "answers", "valid", "closed early", "tokens", "forced")
    table = Table(*("kind", *columns), title="complete and valid", caption=f"budgets: {options.budgets}")
    for kind, count in counts.items():
        table.add_row(kind, *(str(count[column]) for column in columns))
    console.print(table)
    console.print(f"{num_tokens} tokens in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
