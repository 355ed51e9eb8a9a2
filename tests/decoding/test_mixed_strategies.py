"""Any strategies under any constraints in one batch, some of them aborted: what is left is what each would have said
alone, and every block of the KV cache is free again."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from cadenza.decoding import Delta, Engine, EngineConfig, GenerationRequest, SamplingParams
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.strategies.spec import BeamSearch, BestOf, ContrastiveSearch
from cadenza.decoding.voting.answer import FullText, LastNumber
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.models import LoadedModel

STRATEGIES: list[tuple[dict[str, Any], Any]] = [
    ({"temperature": 0.0}, None),
    ({"temperature": 1.0, "n": 3}, None),
    ({"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}, None),
    ({"temperature": 1.0, "mirostat": 2, "mirostat_tau": 2.0}, None),
    ({"temperature": 1.0, "xtc_probability": 0.5, "dry_multiplier": 0.7, "n": 2}, None),
    ({"temperature": 0.0, "n": 2}, BeamSearch(num_beams=3)),
    ({"temperature": 0.0}, BeamSearch(num_beams=4, early_stopping=True, length_penalty=2.0)),
    ({"temperature": 0.0, "n": 4}, BeamSearch(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)),
    ({"temperature": 0.0}, ContrastiveSearch(penalty_alpha=0.5, top_k=3)),
    ({"temperature": 1.2, "n": 2}, BestOf(best_of=4)),
    ({"temperature": 1.0}, SelfConsistency(n=5, answer=LastNumber())),
    (
        {"temperature": 1.0},
        SelfConsistency(n=4, answer=FullText(), weight="logprob", stop_when_decided=False),
    ),
]
SPECS = [
    None,
    None,
    ConstraintSpec.regex("[a-z]{1,6}( [0-9]{2,4})?"),
    ConstraintSpec.choice(["red", "green", "blue", "one hundred and 1"]),
    ConstraintSpec.json_schema(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    ),
    ConstraintSpec.grammar('start: "(" /[0-9]+/ ("," start)* ")"'),
]


@pytest.fixture(scope="module", params=[None, "ngram"])
def small(tiny_model: LoadedModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Room for few branches and few tokens, so that requests are preempted and wait."""
    config = EngineConfig(
        max_num_seqs=7, max_num_batched_tokens=80, kv_cache_memory_gb=0.00018, speculative=request.param
    )
    with Engine(tiny_model, config) as engine:
        yield engine


@pytest.fixture(scope="module")
def constraints(small: Engine) -> list[Constraint | None]:
    return [None if spec is None else small.constraints.compile(spec).result() for spec in SPECS]


def _requests(seed: int, constraints: list[Constraint | None]) -> list[GenerationRequest]:
    rng = random.Random(seed)
    requests = []
    for number in range(10):
        fields, strategy = rng.choice(STRATEGIES)
        common = [rng.randrange(300, 20_000) for _ in range(40)] * 2
        prompt = common[: rng.randrange(1, 80)]
        sampling = SamplingParams(
            max_tokens=rng.randrange(12, 40),
            seed=rng.randrange(2**40),
            logprobs=rng.choice([None, 0, 2]),
            **fields,
        )
        constraint = rng.choice(constraints)
        requests.append(
            GenerationRequest(
                request_id=str(number),
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                strategy=strategy,
                constraint=constraint,
                explain=rng.random() < 0.2,
                priority=rng.choice([0, 0, 1]),
            )
        )
    return requests


def _gist(completion: Completion) -> list[Any]:
    return [
        (choice.text, choice.token_ids, choice.logprobs, choice.finish_reason, choice.score)
        for choice in completion.choices
    ] + [completion.vote]


@pytest.mark.parametrize("seed", range(6))
def test_mixed_strategies_with_aborts(small: Engine, constraints: list[Constraint | None], seed: int) -> None:
    requests = _requests(seed, constraints)
    alone = [_gist(collect(small.submit(request), request.sampling.n)) for request in requests]
    small.reset_prefix_cache()
    rng = random.Random(seed)
    streams = [small.submit(request) for request in requests]
    aborted = set(rng.sample(range(len(requests)), 3))
    for number in aborted:
        for _, event in zip(range(rng.randrange(3)), streams[number], strict=False):
            assert event is not None
        streams[number].abort()
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        if number not in aborted:
            assert _gist(collect(stream, request.sampling.n)) == alone[number], request
    stats = small.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.num_preemptions > 0


def test_what_comes_as_a_stream_is_what_comes_at_once(
    small: Engine, constraints: list[Constraint | None]
) -> None:
    for request in _requests(99, constraints):
        events = list(small.submit(request))
        ends = [event.index for event in events if isinstance(event, Delta) and event.finish_reason]
        assert ends
        assert sorted(ends) == list(range(len(ends)))
        assert len(ends) <= request.sampling.n
