"""Contrastive search composes: with ends, streams, log-probabilities, constraints, company and few places."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import lark
import pytest

from cadenza.decoding import (
    Delta,
    Engine,
    EngineConfig,
    GenerationRequest,
    RequestError,
    RequestStream,
    SamplingParams,
)
from cadenza.decoding.completion import CompletionChoice, collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.strategies.spec import ContrastiveSearch
from cadenza.models import LoadedModel

SPEC = ContrastiveSearch(penalty_alpha=0.6, top_k=4)
PROMPT = tuple(range(1000, 1012))


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=64, kv_cache_memory_gb=0.05)) as running:
        yield running


def submit(
    engine: Engine,
    prompt: Sequence[int] = PROMPT,
    spec: ContrastiveSearch = SPEC,
    constraint: Constraint | None = None,
    priority: int = 0,
    explain: bool = False,
    **sampling: Any,
) -> RequestStream:
    return engine.submit(
        GenerationRequest(
            request_id="test",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**{"max_tokens": 24, **sampling}),
            strategy=spec,
            constraint=constraint,
            priority=priority,
            explain=explain,
        )
    )


def answer(engine: Engine, *args: Any, **fields: Any) -> CompletionChoice:
    return collect(submit(engine, *args, **fields), 1).choices[0]


# ends, streams, log-probabilities


def test_a_stop_string_ends_the_answer(tiny: Engine) -> None:
    whole = answer(tiny)
    stop = whole.text[30:36]
    stopped = answer(tiny, stop=(stop,))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_a_stop_token_ends_the_answer(tiny: Engine) -> None:
    whole = answer(tiny)
    stop = whole.token_ids[9]
    stopped = answer(tiny, stop_token_ids=(stop,))
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_tokens_go_out_when_they_have_won(tiny: Engine) -> None:
    deltas = [event for event in submit(tiny) if isinstance(event, Delta)]
    assert [len(delta.token_ids) for delta in deltas] == [1] * 24
    assert {delta.index for delta in deltas} == {0}
    assert [delta.finish_reason for delta in deltas] == [None] * 23 + ["length"]
    whole = answer(tiny)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids


def scored(engine: Engine, token_ids: Sequence[int]) -> list[float]:
    """The log-probability of each of the tokens after the prompt, as those of a longer prompt."""
    request = GenerationRequest(
        request_id="score",
        prompt_token_ids=(*PROMPT, *token_ids),
        sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
    )
    prompt = collect(engine.submit(request), 1).prompt
    assert prompt is not None
    assert prompt.logprobs is not None
    return [entry.logprob for entry in prompt.logprobs[len(PROMPT) :] if entry is not None]


def test_log_probabilities_are_the_models_own(tiny: Engine) -> None:
    told = answer(tiny, logprobs=3, repetition_penalty=1.3)
    assert told.token_ids == answer(tiny, repetition_penalty=1.3).token_ids
    assert [entry.token_id for entry in told.logprobs] == told.token_ids
    assert all(len(entry.top) == 3 for entry in told.logprobs)
    expected = scored(tiny, told.token_ids)
    assert [entry.logprob for entry in told.logprobs] == pytest.approx(expected, abs=1e-4)


def test_an_explanation_names_the_candidates_that_lost(tiny: Engine) -> None:
    told = answer(tiny, explain=True)
    assert told.token_ids == answer(tiny).token_ids
    assert [entry.token_id for entry in told.explanations] == told.token_ids
    for entry in told.explanations:
        assert entry.decision == "searched"
        assert len(entry.lost) == SPEC.top_k - 1
        assert [score for _, score in entry.lost] == sorted((score for _, score in entry.lost), reverse=True)
        assert entry.token_id not in dict(entry.lost)


def test_a_prompt_that_is_scored_and_searched(tiny: Engine) -> None:
    both = collect(submit(tiny, prompt_logprobs=1), 1)
    assert both.choices[0] == answer(tiny)
    assert both.prompt is not None
    assert both.prompt.logprobs is not None
    assert len(both.prompt.logprobs) == len(PROMPT)


# constraints

TICKET = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "priority": {"enum": ["low", "medium", "high"]},
        "hours": {"type": "integer", "minimum": 1, "maximum": 80},
    },
    "required": ["title", "priority", "hours"],
    "additionalProperties": False,
}
LINES = 'start: line+\nline: WORD "\\t" TAG "\\n"\nWORD: /[^\\t\\n]+/\nTAG: "O" | "B-PER" | "I-PER"\n'
CHOICES = ["yes", "yes, sir", "no", "no, thank you"]
DATE = r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2})?|[a-z]+( [a-z]+)*"
SPECS = {
    "choice": ConstraintSpec.choice(CHOICES),
    "regex": ConstraintSpec.regex(DATE),
    "schema": ConstraintSpec.json_schema(TICKET),
    "grammar": ConstraintSpec.grammar(LINES),
}


def is_valid(kind: str, text: str) -> bool:
    match kind:
        case "choice":
            return text in CHOICES
        case "regex":
            return re.fullmatch(DATE, text) is not None
        case "schema":
            return jsonschema.Draft202012Validator(TICKET).is_valid(json.loads(text))
        case _:
            lark.Lark(LINES, parser="earley", lexer="dynamic_complete").parse(text)
            return True


@pytest.fixture(params=list(SPECS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def constraint(tiny: Engine, kind: str) -> Constraint:
    return tiny.constraints.compile(SPECS[kind]).result()


def test_constrained_answers_are_complete_and_valid_at_every_budget(
    tiny: Engine, kind: str, constraint: Constraint
) -> None:
    least = max(constraint.min_tokens, 1)
    specs = [SPEC, ContrastiveSearch(penalty_alpha=1.0, top_k=9)]
    streams = [
        (budget, submit(tiny, spec=spec, constraint=constraint, max_tokens=budget, logprobs=logprobs))
        for number, budget in enumerate([*range(least, least + 8), 30, 40])
        for spec, logprobs in [(specs[number % 2], (None, 0)[number // 2 % 2])]
    ]
    closed = []
    for budget, stream in streams:
        choice = collect(stream, 1).choices[0]
        assert is_valid(kind, choice.text), (budget, choice)
        assert len(choice.token_ids) <= budget
        assert choice.closed_early is (choice.finish_reason == "length")
        closed.append(choice.closed_early)
    assert any(closed) or kind == "choice"
    assert tiny.stats().kv_cache_usage == 0


def test_log_probabilities_do_not_change_a_constrained_answer(tiny: Engine, constraint: Constraint) -> None:
    """Forced tokens come one by one when they are asked for, in runs when not."""
    plain = answer(tiny, constraint=constraint, max_tokens=60)
    told = answer(tiny, constraint=constraint, max_tokens=60, logprobs=1)
    assert (told.text, told.token_ids, told.num_forced_tokens) == (
        plain.text,
        plain.token_ids,
        plain.num_forced_tokens,
    )
    expected = scored(tiny, told.token_ids)
    assert [entry.logprob for entry in told.logprobs] == pytest.approx(expected, abs=1e-4)


# alone and in company


def crowd(engine: Engine, constraints: Sequence[Constraint | None]) -> list[RequestStream]:
    """Samples and searches, constrained and not."""
    samples = [
        engine.submit(
            GenerationRequest(
                request_id="other",
                prompt_token_ids=PROMPT[:length],
                sampling=SamplingParams(max_tokens=20, n=2, seed=length),
                constraint=constraints[length % len(constraints)],
            )
        )
        for length in range(1, 6)
    ]
    searches = [submit(engine, PROMPT[:length], max_tokens=20) for length in range(3, 7)]
    return samples + searches


def test_the_same_answers_alone_and_in_a_crowd(tiny: Engine) -> None:
    constraints = [None, *(tiny.constraints.compile(SPECS[kind]).result() for kind in ("regex", "schema"))]
    alone = [answer(tiny, constraint=own, max_tokens=30, logprobs=2) for own in constraints]
    others = crowd(tiny, constraints)
    among = [submit(tiny, constraint=own, max_tokens=30, logprobs=2) for own in constraints]
    assert [collect(stream, 1).choices[0] for stream in among] == alone
    for stream in others:
        collect(stream, 2)


@pytest.mark.parametrize("config", [{"max_num_seqs": 4}, {"max_num_seqs": 12, "kv_cache_memory_gb": 0.0001}])
def test_the_same_answers_with_few_seats_or_blocks(
    tiny: Engine, tiny_model: LoadedModel, config: dict[str, Any]
) -> None:
    """Candidates are preempted, and computed again while others wait for them."""
    prompt = [token + 7 for token in range(80)]
    schema = tiny.constraints.compile(SPECS["schema"]).result()
    own: list[dict[str, Any]] = [{"priority": 9}, {"priority": 9, "constraint": schema, "logprobs": 1}]
    alone = [answer(tiny, prompt, **fields) for fields in own]
    with Engine(tiny_model, EngineConfig(**{"kv_cache_memory_gb": 0.05, **config})) as engine:
        others = crowd(engine, [None])
        streams = [submit(engine, prompt, **fields) for fields in own]
        assert [collect(stream, 1).choices[0] for stream in streams] == alone
        for stream in others:
            collect(stream, 2)
        stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


def test_aborted_searches_free_their_blocks(tiny: Engine) -> None:
    streams = [submit(tiny, max_tokens=200) for _ in range(6)]
    for stream in streams:
        next(event for event in stream if isinstance(event, Delta))
        stream.abort()
    answer(tiny)
    assert tiny.stats().kv_cache_usage == 0


# what excludes a search


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("temperature", 0.7), ("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.5)],
)
def test_fields_that_only_change_a_draw_are_refused(tiny: Engine, field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as refused:
        submit(tiny, **{field: value})
    assert refused.value.param == field


def test_more_candidates_than_the_batch_has_places_are_refused(tiny: Engine) -> None:
    with pytest.raises(RequestError, match="at most 64") as refused:
        submit(tiny, spec=ContrastiveSearch(penalty_alpha=0.5, top_k=65))
    assert refused.value.param == "top_k"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_temperature_of_a_search_means_nothing(tiny: Engine, temperature: float) -> None:
    assert answer(tiny, temperature=temperature) == answer(tiny)
