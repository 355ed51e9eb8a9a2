"""Constrained answers of the engine are complete and valid at any budget, whoever samples.

The model here is a tiny random one with the real vocabulary: it knows no grammar, and at temperature 1 it is close to
a sampler that draws any allowed token, which is the hardest case for a constraint.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import lark
import pytest
import regex

from cadenza.decoding import (
    Engine,
    EngineConfig,
    GenerationRequest,
    RequestError,
    RequestFailed,
    RequestStream,
    SamplingParams,
)
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.errors import ConstraintError, MatcherError
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.models import LoadedModel

DATA = Path(__file__).parents[1] / "data" / "constraints"
SCHEMAS = Path(__file__).parents[3] / "shared" / "data" / "dev_schemas.jsonl"
GRAMMARS = {path.stem: path for path in sorted(DATA.glob("*.lark"))}
REGEXES = (DATA / "regexes.txt").read_text(encoding="utf-8").splitlines()
PROMPT = tuple(range(1000, 1012))


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    config = EngineConfig(max_num_seqs=64, max_queue=2000, kv_cache_memory_gb=0.1)
    with Engine(tiny_model, config) as running:
        yield running


def submit(engine: Engine, constraint: Constraint, max_tokens: int | None, **sampling: Any) -> RequestStream:
    params = SamplingParams(max_tokens=max_tokens, **{"seed": 7, **sampling})
    return engine.submit(
        GenerationRequest(request_id="test", prompt_token_ids=PROMPT, sampling=params, constraint=constraint)
    )


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    max_tokens: int


def answers_at_budgets(engine: Engine, specs: Mapping[str, ConstraintSpec]) -> dict[str, list[Answer]]:
    """For each constraint answers at its least budget, one more, and others: all together in one batch.

    A budget below the least one is refused with the number. A constraint that is refused has no answers.
    """
    streams: dict[str, list[tuple[int, RequestStream]]] = {}
    futures = {name: engine.constraints.compile(spec) for name, spec in specs.items()}
    for name, future in futures.items():
        if isinstance(future.exception(), ConstraintError):
            continue
        constraint, streams[name] = future.result(), []
        least = max(constraint.min_tokens, 1)
        for budget in sorted({least, least + 1, 8, 32, 120}):
            if budget >= least and budget + len(PROMPT) <= engine.max_model_len:
                streams[name].append((budget, submit(engine, constraint, budget)))
            elif budget < least:
                with pytest.raises(RequestError, match=f"has {least} tokens") as refused:
                    submit(engine, constraint, budget)
                assert refused.value.param == "max_tokens"
    return {
        name: [
            Answer(choice.text, len(choice.token_ids), budget)
            for budget, stream in own
            for choice in collect(stream, 1).choices
        ]
        for name, own in streams.items()
    }


@pytest.fixture(scope="module")
def regex_answers(tiny: Engine) -> dict[str, list[Answer]]:
    return answers_at_budgets(tiny, {pattern: ConstraintSpec.regex(pattern) for pattern in REGEXES})


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_regex_is_matched_in_full_at_every_budget(
    regex_answers: dict[str, list[Answer]], pattern: str
) -> None:
    assert len(regex_answers[pattern]) >= 2
    for answer in regex_answers[pattern]:
        assert regex.fullmatch(pattern, answer.text), answer
        if r"\p" not in pattern:
            assert re.fullmatch(pattern, answer.text), answer
        assert answer.num_tokens <= answer.max_tokens


@pytest.fixture(scope="module")
def grammar_answers(tiny: Engine) -> dict[str, list[Answer]]:
    specs = {
        name: ConstraintSpec.grammar(path.read_text(encoding="utf-8")) for name, path in GRAMMARS.items()
    }
    return answers_at_budgets(tiny, specs)


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_derives_the_answer_at_every_budget(
    grammar_answers: dict[str, list[Answer]], name: str
) -> None:
    parser = lark.Lark(GRAMMARS[name].read_text(encoding="utf-8"), parser="earley", lexer="dynamic_complete")
    assert len(grammar_answers[name]) >= 2
    for answer in grammar_answers[name]:
        parser.parse(answer.text)  # raises where it does not
        assert answer.num_tokens <= answer.max_tokens


@pytest.mark.skipif(not SCHEMAS.is_file(), reason="the schemas are not part of the repository")
def test_answers_under_real_schemas_validate_at_every_budget(tiny: Engine) -> None:
    cases = [json.loads(line) for line in SCHEMAS.read_text(encoding="utf-8").splitlines()]
    schemas = {case["name"]: case["schema"] for case in cases}
    answers = answers_at_budgets(
        tiny, {name: ConstraintSpec.json_schema(schema) for name, schema in schemas.items()}
    )
    assert len(answers) >= len(schemas) - 10
    for name, own in answers.items():
        kind = jsonschema.validators.validator_for(schemas[name], jsonschema.Draft202012Validator)
        validator = kind(schemas[name], format_checker=kind.FORMAT_CHECKER)
        for answer in own:
            assert validator.is_valid(json.loads(answer.text)), (name, answer)
            assert answer.num_tokens <= answer.max_tokens


TICKET = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "priority": {"enum": ["low", "medium", "high"]},
        "estimate_hours": {"type": "integer", "minimum": 1, "maximum": 80},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["title", "priority", "estimate_hours", "tags"],
    "additionalProperties": False,
}
LINES = (
    'start: line+\nline: WORD "\\t" TAG "\\n"\nWORD: /[^\\t\\n]+/\nTAG: "O" | "B-PER" | "I-PER" | "B-LOC"\n'
)
SPECS = {
    "choice": ConstraintSpec.choice(["yes", "yes, sir", "no", "no, thank you"]),
    "regex": ConstraintSpec.regex(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?Z"),
    "schema": ConstraintSpec.json_schema(TICKET),
    "grammar": ConstraintSpec.grammar(LINES),
}


@pytest.fixture(params=list(SPECS))
def constraint(request: pytest.FixtureRequest, tiny: Engine) -> Constraint:
    return tiny.constraints.compile(SPECS[request.param]).result()


def token_ids(answer: Completion) -> list[list[int]]:
    return [choice.token_ids for choice in answer.choices]


def test_the_same_tokens_alone_and_in_a_crowd(tiny: Engine, constraint: Constraint) -> None:
    alone = collect(submit(tiny, constraint, 60, seed=3), 1)
    crowd = [
        submit(tiny, tiny.constraints.compile(spec).result(), 64, seed=seed)
        for seed, spec in enumerate([*SPECS.values()] * 4)
    ]
    among = collect(submit(tiny, constraint, 60, seed=3), 1)
    for stream in crowd:
        collect(stream, 1)
    assert token_ids(among) == token_ids(alone)


def test_log_probabilities_do_not_change_the_tokens_and_are_the_models_own(
    tiny: Engine, constraint: Constraint
) -> None:
    plain = collect(submit(tiny, constraint, 60, seed=5), 1).choices[0]
    told = collect(submit(tiny, constraint, 60, seed=5, logprobs=2), 1).choices[0]
    assert told.token_ids == plain.token_ids
    assert told.num_forced_tokens == plain.num_forced_tokens
    assert [entry.token_id for entry in told.logprobs] == told.token_ids
    scored = collect(
        tiny.submit(
            GenerationRequest(
                request_id="score",
                prompt_token_ids=(*PROMPT, *told.token_ids),
                sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
            )
        ),
        1,
    ).prompt
    assert scored is not None
    assert scored.logprobs is not None
    expected = [entry.logprob for entry in scored.logprobs[len(PROMPT) :] if entry is not None]
    assert [entry.logprob for entry in told.logprobs] == pytest.approx(expected, abs=1e-4)


def test_each_of_n_answers_is_what_it_would_be_with_another_n(tiny: Engine, constraint: Constraint) -> None:
    four = token_ids(collect(submit(tiny, constraint, 48, n=4, seed=11), 4))
    two = token_ids(collect(submit(tiny, constraint, 48, n=2, seed=11), 2))
    assert four[:2] == two


def test_preempted_branches_go_on_as_if_nothing_had_happened(
    tiny_model: LoadedModel, constraint: Constraint
) -> None:
    with Engine(tiny_model, EngineConfig(max_num_seqs=8, kv_cache_memory_gb=0.0001)) as engine:
        alone = [token_ids(collect(submit(engine, constraint, 100, seed=seed), 1)) for seed in range(6)]
        streams = [submit(engine, constraint, 100, seed=seed) for seed in range(6)]
        together = [token_ids(collect(stream, 1)) for stream in streams]
        num_preemptions = engine.stats().num_preemptions
    assert together == alone
    assert num_preemptions or constraint.spec.kind != "grammar"  # the others' answers are short


def test_only_a_change_that_the_budget_made_is_called_early(tiny: Engine) -> None:
    choice = tiny.constraints.compile(SPECS["choice"]).result()
    ample = collect(submit(tiny, choice, 100), 1).choices[0]
    assert (ample.finish_reason, ample.closed_early) == ("stop", False)
    words = tiny.constraints.compile(ConstraintSpec.regex("([a-z]+ )*[a-z]+")).result()
    short = collect(submit(tiny, words, 5, temperature=0.0), 1).choices[0]
    assert (short.finish_reason, short.closed_early) == ("length", True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ("x",)),
        ("ignore_eos", True),
        ("min_tokens", 2),
        ("bad_words", ("x",)),
        ("allowed_token_ids", (1, 2)),
        ("stop_token_ids", (5,)),
    ],
)
def test_what_could_cut_or_forbid_the_answer_is_refused(tiny: Engine, field: str, value: Any) -> None:
    constraint = tiny.constraints.compile(SPECS["choice"]).result()
    with pytest.raises(RequestError) as refused:
        submit(tiny, constraint, 20, **{field: value})
    assert refused.value.param == field


def test_a_matcher_that_fails_fails_its_request_only(
    tiny: Engine, constraint: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = submit(tiny, constraint, 40, seed=2)
    broken = collect_error(tiny, constraint, monkeypatch)
    assert "matcher" in str(broken)
    assert collect(fine, 1).choices[0].finish_reason


def collect_error(tiny: Engine, constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> RequestFailed:
    """The error of a request whose matcher breaks at its third token."""
    calls: list[int] = []

    class Broken:
        is_complete = is_ended = limited = False

        def fill(self, row: Any, remaining: int) -> None:
            calls.append(remaining)
            if len(calls) == 3:
                raise MatcherError("out of lexer fuel")
            row[:] = -1

        def accept(self, token_id: int, remaining: int) -> int:
            return token_id

        def forced(self, remaining: int) -> list[int]:
            return []

    monkeypatch.setattr(type(constraint), "matcher", lambda self: Broken())
    stream = submit(tiny, constraint, 40)
    monkeypatch.undo()
    with pytest.raises(RequestFailed) as failed:
        collect(stream, 1)
    return failed.value
