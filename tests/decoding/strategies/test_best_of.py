"""best_of against an offline recount: the same samples as choices of a plain request, ranked here."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from cadenza.decoding import (
    Delta,
    Engine,
    EngineConfig,
    GenerationRequest,
    PromptDone,
    RequestError,
    RequestStream,
    SamplingParams,
)
from cadenza.decoding.completion import CompletionChoice, collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.request import Event, Unsent
from cadenza.decoding.strategies.spec import BestOf
from cadenza.models import LoadedModel
from cadenza.server.answers.usage import Usage

PROMPT = tuple(range(1000, 1012))
SPECS = {
    "free": None,
    "choice": ConstraintSpec.choice(["yes", "yes, sir", "no", "no, thank you", "perhaps, if you like"]),
    "regex": ConstraintSpec.regex(r"\d{4}-\d{2}-\d{2}|[a-z]+( [a-z]+)*"),
    "schema": ConstraintSpec.json_schema(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
    "grammar": ConstraintSpec.grammar('start: item ("," item)*\nitem: /[a-z]{1,9}/ "=" /[0-9]{1,4}/'),
}


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=64, kv_cache_memory_gb=0.05)) as running:
        yield running


@pytest.fixture(params=list(SPECS))
def constraint(request: pytest.FixtureRequest, tiny: Engine) -> Constraint | None:
    spec = SPECS[request.param]
    return None if spec is None else tiny.constraints.compile(spec).result()


def submit(
    engine: Engine, spec: BestOf | None, n: int, constraint: Constraint | None = None, **sampling: Any
) -> RequestStream:
    return engine.submit(
        GenerationRequest(
            request_id="test",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(n=n, **{"max_tokens": 24, "seed": 5, **sampling}),
            strategy=spec,
            constraint=constraint,
        )
    )


def cumulative(choice: CompletionChoice) -> float:
    return sum(entry.logprob for entry in choice.logprobs)


def recount(engine: Engine, best_of: int, constraint: Constraint | None = None, **sampling: Any) -> Any:
    """All samples, the likeliest first; of equal ones the earlier."""
    samples = collect(submit(engine, None, best_of, constraint, **{"logprobs": 0, **sampling}), best_of)
    return sorted(samples.choices, key=cumulative, reverse=True)


def gist(choices: Sequence[CompletionChoice]) -> list[tuple[object, ...]]:
    return [
        (each.text, each.token_ids, each.finish_reason, each.closed_early, each.num_forced_tokens)
        for each in choices
    ]


@pytest.mark.parametrize("sampling", [{}, {"seed": 6, "top_k": 50, "repetition_penalty": 1.2}])
def test_the_likeliest_samples_come_back_in_their_order(
    tiny: Engine, constraint: Constraint | None, sampling: dict[str, Any]
) -> None:
    ranked = recount(tiny, 7, constraint, **sampling)
    assert len({cumulative(choice) for choice in ranked}) > 1
    events = list(submit(tiny, BestOf(best_of=7), 3, constraint, **sampling))
    best = collect(events, 3).choices
    assert gist(best) == gist(ranked[:3])
    assert [choice.score for choice in best] == pytest.approx([cumulative(c) for c in ranked[:3]], abs=1e-9)
    assert all(choice.logprobs == [] for choice in best)
    usage = Usage()
    for event in events:
        usage.count(event)
    assert usage.completion_tokens == sum(len(choice.token_ids) for choice in ranked)
    assert tiny.stats().kv_cache_usage == 0


def test_nothing_is_sent_before_the_last_sample_has_ended(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[list[Event]] = []
    put = RequestStream.put

    def watched(stream: RequestStream, events: Iterable[Event], **fields: Any) -> None:
        delivered.append(list(events))
        put(stream, delivered[-1], **fields)

    monkeypatch.setattr(RequestStream, "put", watched)
    constraint = tiny.constraints.compile(SPECS["regex"]).result()
    events = list(submit(tiny, BestOf(best_of=6), 2, constraint))
    *before, last = delivered
    assert [type(event) for batch in before for event in batch] == [PromptDone]
    assert [*before[0], *last] == events
    indices = [event.index for event in last if isinstance(event, Delta)]
    assert indices == sorted(indices)
    assert indices.count(0) > 2  # the news of several steps
    assert isinstance(last[-1], Unsent)


def test_log_probabilities_are_those_of_the_samples(tiny: Engine) -> None:
    ranked = recount(tiny, 5, logprobs=2)
    best = collect(submit(tiny, BestOf(best_of=5), 2, logprobs=2), 2).choices
    assert [choice.logprobs for choice in best] == [choice.logprobs for choice in ranked[:2]]


def test_the_default_model(engine: Engine) -> None:
    ranked = recount(engine, 4, max_tokens=8)
    best = collect(submit(engine, BestOf(best_of=4), 4, max_tokens=8), 4).choices
    assert gist(best) == gist(ranked)


def test_greedy_samples_are_all_the_same(tiny: Engine) -> None:
    one = collect(submit(tiny, None, 1, temperature=0.0), 1).choices
    best = collect(submit(tiny, BestOf(best_of=3), 2, temperature=0.0), 2).choices
    assert gist(best) == gist(one) * 2


def test_more_samples_than_the_batch_has_places(tiny: Engine, tiny_model: LoadedModel) -> None:
    ranked = recount(tiny, 11)
    with Engine(tiny_model, EngineConfig(max_num_seqs=3, kv_cache_memory_gb=0.05)) as engine:
        best = collect(submit(engine, BestOf(best_of=11), 2), 2).choices
        assert engine.stats().kv_cache_usage == 0
    assert gist(best) == gist(ranked[:2])


def test_one_sample_of_one_is_the_sample(tiny: Engine) -> None:
    events = list(submit(tiny, BestOf(best_of=1), 1))
    assert gist(collect(events, 1).choices) == gist(collect(submit(tiny, None, 1), 1).choices)
    assert not any(isinstance(event, Unsent) for event in events)


def test_no_tokens_of_any_sample(tiny: Engine) -> None:
    choices = collect(submit(tiny, BestOf(best_of=5), 2, max_tokens=0), 2).choices
    assert gist(choices) == [("", [], "length", None, 0)] * 2


def test_fewer_samples_than_choices_are_refused(tiny: Engine) -> None:
    with pytest.raises(RequestError, match="at least n") as refused:
        submit(tiny, BestOf(best_of=2), 3)
    assert refused.value.param == "best_of"


@pytest.mark.parametrize("best_of", [0, -1, 129])
def test_numbers_out_of_range_are_refused(best_of: int) -> None:
    with pytest.raises(RequestError, match="between 1 and 128") as refused:
        BestOf(best_of=best_of)
    assert refused.value.param == "best_of"
