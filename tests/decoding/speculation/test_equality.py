"""Whoever drafts, the answer is the same: tokens, text, reasons, and log-probabilities to the last bit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cadenza.decoding import Engine, GenerationRequest, RequestStream, SamplingParams
from cadenza.decoding.completion import CompletionChoice, collect
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.request import Delta, Event, VoteProgress
from cadenza.decoding.strategies.spec import BeamSearch, BestOf, ContrastiveSearch, StrategySpec
from cadenza.decoding.voting.answer import LastNumber
from cadenza.decoding.voting.spec import SelfConsistency

PROMPT = (*range(1000, 1080), *range(1000, 1030))
FEW = tuple(range(300, 312))
"""An answer of twelve different tokens repeats itself soon, so that a lookup finds something."""
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["reservation", "cancellation"]},
        "guests": {"type": "integer", "minimum": 1, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["kind", "guests", "names"],
    "additionalProperties": False,
}
LARK = 'start: "(" [item ("," item)*] ")"\nitem: "one" | "two" | /[0-9]{1,3}/'


@dataclass(frozen=True)
class Case:
    sampling: dict[str, Any] = field(default_factory=dict)
    constraint: ConstraintSpec | None = None
    strategy: StrategySpec | None = None
    explain: bool = False


CASES = {
    "greedy": Case({"temperature": 0.0, "logprobs": 2}),
    "sampled": Case({"logprobs": 2}),
    "few": Case({"allowed_token_ids": FEW, "logprobs": 0}),
    "truncated": Case({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}),
    "thresholds": Case({"top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.05, "logprobs": 1}),
    "penalties": Case(
        {
            "allowed_token_ids": FEW,
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.4,
            "presence_penalty": 0.3,
            "logprobs": 1,
        }
    ),
    "dry": Case({"allowed_token_ids": FEW, "dry_multiplier": 0.8, "dry_allowed_length": 1, "logprobs": 1}),
    "bad words": Case({"temperature": 0.0, "bad_words": (" the", " and one"), "logit_bias": {300: 20.0}}),
    "min tokens": Case(
        {"allowed_token_ids": FEW, "min_tokens": 30, "stop_token_ids": FEW[:4], "ignore_eos": False}
    ),
    "mirostat": Case({"mirostat": 2, "mirostat_tau": 3.0, "logprobs": 1}),
    "four": Case({"n": 4, "allowed_token_ids": FEW, "logprobs": 1}),
    "best of": Case({"n": 2, "allowed_token_ids": FEW}, strategy=BestOf(best_of=5)),
    "vote": Case(
        {"logprobs": 0},
        ConstraintSpec.regex(r"[a-z]{4,12}, so the answer is number [1-3]\."),
        SelfConsistency(n=7, answer=LastNumber(), weight="logprob"),
    ),
    "beams": Case({}, ConstraintSpec.regex(r"[a-z]{9} one two three [a-z]{4}"), BeamSearch(num_beams=3)),
    "contrastive": Case(
        {"temperature": 0.0}, strategy=ContrastiveSearch(penalty_alpha=0.6, top_k=3), explain=True
    ),
    "explained": Case({"allowed_token_ids": FEW}, explain=True),
    "regex": Case({}, ConstraintSpec.regex(r"(abcabcabd ){2}[a-c]{10,20}(xyz){3}")),
    "regex scored": Case({"logprobs": 2}, ConstraintSpec.regex(r"(abcabcabd ){2}[a-c]{10,20}(xyz){3}")),
    "runs": Case({}, ConstraintSpec.regex(r"([xy] one two three four five six seven; ){5}[a-z]{12}")),
    "choice": Case({"logprobs": 1}, ConstraintSpec.choice(["to be or not to be", "to be or not to bee"])),
    "schema": Case({}, ConstraintSpec.json_schema(SCHEMA)),
    "schema scored": Case({"logprobs": 1, "temperature": 0.0}, ConstraintSpec.json_schema(SCHEMA)),
    "grammar": Case({"n": 2, "logprobs": 0}, ConstraintSpec.grammar(LARK)),
    "explained grammar": Case({}, ConstraintSpec.grammar(LARK), explain=True),
}
MAX_TOKENS = 40
CONSTRAINED_MAX_TOKENS = (30, 60)


def submit(engine: Engine, compiler: Engine, case: Case, priority: int = 0, **more: Any) -> RequestStream:
    constraint = None if case.constraint is None else compiler.constraints.compile(case.constraint).result()
    defaults = {"max_tokens": MAX_TOKENS, "seed": 5, "ignore_eos": case.constraint is None}
    return engine.submit(
        GenerationRequest(
            request_id="test",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(**{**defaults, **case.sampling, **more}),
            constraint=constraint,
            strategy=case.strategy,
            explain=case.explain,
            priority=priority,
        )
    )


def answer(events: Sequence[Event]) -> tuple[list[CompletionChoice], list[Any]]:
    """What a client can see."""
    deltas = [event for event in events if isinstance(event, Delta)]
    choices = collect(deltas, 1 + max(delta.index for delta in deltas)).choices
    explained = [(delta.index, delta.explanations) for delta in deltas if delta.explanations is not None]
    explained.sort(key=lambda pair: pair[0])
    votes = [event for event in events if isinstance(event, VoteProgress) and event.is_final]
    return choices, [explained, votes]


def solo(engine: Engine, compiler: Engine, name: str, **more: Any) -> Any:
    return answer(list(submit(engine, compiler, CASES[name], **more)))


def budgets(name: str) -> list[dict[str, Any]]:
    if name == "runs":
        return [{"max_tokens": 90, "seed": seed} for seed in range(3)]
    if CASES[name].constraint is None:
        return [{}]
    return [{"max_tokens": max_tokens} for max_tokens in CONSTRAINED_MAX_TOKENS]


@pytest.fixture(scope="module")
def expected(plain: Engine) -> dict[str, list[Any]]:
    return {name: [solo(plain, plain, name, **more) for more in budgets(name)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_alone(ngram: Engine, plain: Engine, expected: dict[str, list[Any]], name: str) -> None:
    for more, answered in zip(budgets(name), expected[name], strict=True):
        assert solo(ngram, plain, name, **more) == answered


def test_all_at_once(drafted: Engine, plain: Engine, expected: dict[str, list[Any]]) -> None:
    jobs = [(name, number, more) for name in CASES for number, more in enumerate(budgets(name))]
    streams = [submit(drafted, plain, CASES[name], **more) for name, _, more in jobs]
    for (name, number, _), stream in zip(jobs, streams, strict=True):
        assert answer(list(stream)) == expected[name][number], name
    assert drafted.stats().kv_cache_usage == 0


@pytest.mark.parametrize("name", ["greedy", "sampled", "few", "truncated"])
def test_a_stop_string_ends_it_at_the_same_token(drafted: Engine, plain: Engine, name: str) -> None:
    text = solo(plain, plain, name)[0][0].text
    stop = (text[len(text) // 2 :][:3],)
    expected = solo(plain, plain, name, stop=stop)
    assert expected[0][0].stop_reason == stop[0]
    assert solo(drafted, plain, name, stop=stop) == expected
