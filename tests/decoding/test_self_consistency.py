"""Votes as the engine runs them, against the same samples drawn as independent choices and counted by hand.

Sample i of a vote is choice i of a request for n choices with the same seed, so that the truth is at hand: what the
winner is, which sample is returned, how many samples there were at least, what each cost.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from cadenza.decoding import (
    Delta,
    Engine,
    EngineConfig,
    GenerationRequest,
    PromptDone,
    RequestError,
    SamplingParams,
)
from cadenza.decoding.completion import Completion, CompletionChoice, collect, prompt_token_ids
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.request import Event, Unsent, VoteProgress
from cadenza.decoding.voting.answer import AnswerRule, FullText, LastNumber, Pattern, Pointer
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.models import LoadedModel

VOWEL = Pattern("[aeiou]")
SEED = 11


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=32, kv_cache_memory_gb=0.02)) as engine:
        yield engine


@dataclass(frozen=True)
class Outcome:
    """Everything that a stream said."""

    prompt: PromptDone
    winner: CompletionChoice
    progress: tuple[VoteProgress, ...]
    vote: VoteProgress
    unsent: Unsent


def request(
    prompt: Sequence[int] = range(1000, 1040),
    strategy: SelfConsistency | None = None,
    constraint: Constraint | None = None,
    **sampling: Any,
) -> GenerationRequest:
    fields = {"max_tokens": 10, "seed": SEED, **sampling}
    return GenerationRequest(
        request_id="vote",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**fields),
        strategy=strategy,
        constraint=constraint,
    )


def outcome_of(events: Iterator[Event]) -> Outcome:
    """Checks the order of events: the prompt, news of samples, the decision, the winner."""
    told = list(events)
    first, *rest = told
    assert isinstance(first, PromptDone)
    num_progress = next(at for at, event in enumerate(rest) if event.is_final)  # type: ignore[union-attr]
    progress, (vote, unsent, *deltas) = rest[:num_progress], rest[num_progress:]
    assert all(isinstance(event, VoteProgress) for event in progress)
    assert isinstance(vote, VoteProgress)
    assert isinstance(unsent, Unsent)
    assert all(isinstance(event, Delta) and event.index == 0 for event in deltas)
    assert [event.finish_reason is not None for event in deltas] == [False] * (len(deltas) - 1) + [True]  # type: ignore[union-attr]
    winner = collect(iter(deltas), 1).choices[0]
    return Outcome(first, winner, tuple(progress), vote, unsent)  # type: ignore[arg-type]


def voted(engine: Engine, strategy: SelfConsistency, **fields: Any) -> Outcome:
    return outcome_of(engine.submit(request(strategy=strategy, **fields)))


def samples(engine: Engine, n: int, **fields: Any) -> Completion:
    """The same samples as choices that know of no vote."""
    return collect(engine.submit(request(n=n, **{"logprobs": 0, **fields})), n)


def recount(answers: Sequence[str | None], weights: Sequence[float]) -> tuple[str | None, int]:
    """Winner and returned sample, the plain way."""
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    if not totals:
        return None, 0
    winner = max(totals, key=lambda answer: (totals[answer], -answers.index(answer)))
    return winner, answers.index(winner)


def last_vowel(text: str) -> str | None:
    return next((letter for letter in reversed(text) if letter in "aeiou"), None)


def likelihood(choice: CompletionChoice) -> float:
    return math.exp(sum(entry.logprob for entry in choice.logprobs) / len(choice.logprobs))


@pytest.mark.parametrize("weight", ["count", "logprob"])
@pytest.mark.parametrize("seed", range(8))
def test_a_vote_is_the_recount_of_the_same_samples(tiny: Engine, weight: Any, seed: int) -> None:
    """All samples are drawn offline; the vote, with and without stopping, has the winner that they have."""
    draw = random.Random(seed)
    n = draw.randrange(1, 13)
    fields: dict[str, Any] = {
        "prompt": [draw.randrange(1000, 9000) for _ in range(draw.randrange(1, 90))],
        "seed": draw.randrange(1000),
        "max_tokens": draw.randrange(1, 12),
        "temperature": draw.choice((0.3, 0.6, 1.0)),
    }
    choices = samples(tiny, n, **fields).choices
    answers = [last_vowel(choice.text) for choice in choices]
    weights = [likelihood(choice) if weight == "logprob" else 1.0 for choice in choices]
    lengths = [len(choice.token_ids) for choice in choices]
    winner, index = recount(answers, weights)
    for stops in (True, False):
        spec = SelfConsistency(n=n, answer=VOWEL, weight=weight, stop_when_decided=stops)
        outcome = voted(tiny, spec, logprobs=0, **fields)
        vote, num_run = outcome.vote, outcome.vote.num_finished
        assert (vote.answer, vote.sample) == (winner, index)
        assert outcome.winner == choices[index]
        assert vote.num_stopped == n - num_run
        assert stops or num_run == n
        assert vote.num_tokens == sum(lengths[:num_run])
        assert vote.num_tokens_saved == round((n - num_run) * sum(lengths[:num_run]) / num_run)
        assert outcome.unsent.num_tokens == vote.num_tokens - lengths[index]
        assert sorted(news.sample for news in outcome.progress) == list(range(num_run))
        assert all(news.sample_answer == answers[news.sample] for news in outcome.progress)
        assert vote.num_abstained == answers[:num_run].count(None)
        assert dict(vote.counts) == {a: answers[:num_run].count(a) for a in set(answers[:num_run]) - {None}}
        for answer, total in vote.weights:
            own = [
                weight for weight, given in zip(weights, answers[:num_run], strict=False) if given == answer
            ]
            assert total == pytest.approx(sum(own), rel=1e-12)


def test_without_any_answer_the_first_sample_is_returned(tiny: Engine) -> None:
    outcome = voted(tiny, SelfConsistency(n=5, answer=Pattern("never")))
    assert outcome.winner.text == samples(tiny, 1).text
    assert outcome.vote.answer is None
    assert outcome.vote.sample == 0
    assert (outcome.vote.num_finished, outcome.vote.num_abstained, outcome.vote.counts) == (5, 5, ())


@pytest.mark.parametrize(
    ("n", "min_samples", "num_run"), [(1, 1, 1), (2, 1, 1), (9, 1, 5), (16, 1, 8), (16, 11, 11)]
)
def test_where_all_agree_half_of_the_samples_are_enough(
    tiny: Engine, n: int, min_samples: int, num_run: int
) -> None:
    """Greedy samples are one text."""
    spec = SelfConsistency(n=n, answer=FullText(), min_samples=min_samples)
    outcome = voted(tiny, spec, temperature=0.0)
    assert outcome.vote.num_finished == num_run
    assert outcome.vote.num_stopped == n - num_run
    assert outcome.vote.num_tokens == num_run * 10
    assert outcome.vote.num_tokens_saved == (n - num_run) * 10
    assert outcome.winner.text == samples(tiny, 1, temperature=0.0).text


def test_a_confident_vote_stops_earlier(tiny: Engine) -> None:
    """P(p > 1/2) after four equal votes: 31/32."""
    outcome = voted(tiny, SelfConsistency(n=16, answer=FullText(), confidence=0.95), temperature=0.0)
    assert outcome.vote.num_finished == 4


VOTES = [
    (SelfConsistency(n=9, answer=VOWEL), {"seed": 1}),
    (SelfConsistency(n=12, answer=VOWEL, weight="logprob"), {"seed": 2, "temperature": 0.7}),
    (
        SelfConsistency(n=7, answer=FullText(), stop_when_decided=False),
        {"seed": 3, "max_tokens": 1, "logprobs": 2},
    ),
    (SelfConsistency(n=16, answer=LastNumber(), confidence=0.9), {"seed": 4, "prompt": range(300, 411)}),
]


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_seqs": 3},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 72, "max_num_seqs": 8},
        {"kv_cache_memory_gb": 0.00012, "max_num_seqs": 16},
    ],
    ids=["few seats", "no prefix cache", "small steps", "few blocks"],
)
def test_company_changes_nothing(tiny: Engine, tiny_model: LoadedModel, config: dict[str, Any]) -> None:
    """Alone with all the room there is, or together where samples wait for each other and lose their places."""
    alone = [voted(tiny, spec, **fields) for spec, fields in VOTES]
    with Engine(tiny_model, EngineConfig(**{"kv_cache_memory_gb": 0.005, **config})) as engine:
        streams = [engine.submit(request(strategy=spec, **fields)) for spec, fields in VOTES]
        plain = engine.submit(request(n=4, max_tokens=30))
        for before, stream in zip(alone, streams, strict=True):
            outcome = outcome_of(stream)
            assert (outcome.vote, outcome.winner, outcome.unsent) == (
                before.vote,
                before.winner,
                before.unsent,
            )
        assert collect(plain, 4).choices == collect(tiny.submit(request(n=4, max_tokens=30)), 4).choices
        if "kv_cache_memory_gb" in config:
            assert engine.stats().num_preemptions > 0
        assert engine.stats().kv_cache_usage == 0


def test_an_abandoned_vote_leaves_nothing_behind(tiny: Engine) -> None:
    for num_events in (1, 2, 6):
        stream = tiny.submit(request(strategy=SelfConsistency(n=12, answer=Pattern("never")), max_tokens=40))
        for _ in range(num_events):
            next(stream)
        stream.abort()
    samples(tiny, 1)
    assert tiny.stats().kv_cache_usage == 0
    assert tiny.stats().num_running == 0


def test_the_prompt_is_stored_once(tiny: Engine) -> None:
    """Blocks that are held while n samples run: the prompt's, and those that each sample fills itself."""
    n, block_size = 12, tiny.config.block_size
    prompt = range(400, 400 + 8 * block_size)
    runner, held = tiny._core._runner, []

    def watching(*args: Any, **kwargs: Any) -> Any:
        held.append(tiny._core.pool.num_held)
        return runner(*args, **kwargs)

    tiny._core._runner = watching  # type: ignore[assignment]
    try:
        spec = SelfConsistency(n=n, answer=FullText(), stop_when_decided=False)
        outcome = voted(tiny, spec, prompt=prompt, max_tokens=block_size, ignore_eos=True)
    finally:
        tiny._core._runner = runner
    assert outcome.vote.num_finished == n
    assert max(held) == 8 + n


# constraints

SCHEMA = {
    "type": "object",
    "properties": {"why": {"type": "string", "maxLength": 4}, "answer": {"enum": [1, 2, "2"]}},
    "required": ["why", "answer"],
    "additionalProperties": False,
}


def constrained(engine: Engine, spec: ConstraintSpec) -> Constraint:
    return engine.constraints.compile(spec).result()


@pytest.mark.parametrize(
    ("constraint", "rule", "read"),
    [
        (
            ConstraintSpec.json_schema(SCHEMA),
            Pointer("/answer"),
            lambda text: str(json.loads(text)["answer"]),
        ),
        (ConstraintSpec.choice(["yes", "no", "maybe"]), FullText(), lambda text: text),
        (ConstraintSpec.regex("[a-z]{3} so [1-3]\\.0"), LastNumber(), lambda text: text[-3]),
        (ConstraintSpec.regex("(A|B)[0-9]{2}"), Pattern("^(?P<answer>.)"), lambda text: text[0].lower()),
    ],
    ids=["schema", "choice", "number", "pattern"],
)
@pytest.mark.parametrize("weight", ["count", "logprob"])
def test_votes_among_constrained_answers(
    tiny: Engine, constraint: ConstraintSpec, rule: AnswerRule, read: Any, weight: Any
) -> None:
    """Every sample satisfies the constraint, forced tokens included; the winner is that of the recount."""
    fields: dict[str, Any] = {"constraint": constrained(tiny, constraint), "max_tokens": 40}
    choices = samples(tiny, 7, **fields).choices
    answers = [read(choice.text) for choice in choices]
    weights = [likelihood(choice) if weight == "logprob" else 1.0 for choice in choices]
    outcome = voted(tiny, SelfConsistency(n=7, answer=rule, weight=weight), **fields)
    winner, index = recount(answers, weights)
    assert outcome.vote.answer is not None
    assert (outcome.vote.answer.lower(), outcome.vote.sample) == (winner, index)
    assert outcome.winner.text == choices[index].text
    assert outcome.winner.finish_reason == choices[index].finish_reason
    assert outcome.vote.num_abstained == 0
    assert outcome.unsent.num_tokens == sum(
        len(choice.token_ids) for choice in choices[: outcome.vote.num_finished]
    ) - len(choices[index].token_ids)


def test_forced_tokens_of_samples_that_are_not_returned_are_known(tiny: Engine) -> None:
    constraint = constrained(tiny, ConstraintSpec.regex("(yes|no), that is the answer"))
    choices = samples(tiny, 4, constraint=constraint, logprobs=None, max_tokens=20).choices
    spec = SelfConsistency(n=4, answer=FullText(), stop_when_decided=False)
    outcome = voted(tiny, spec, constraint=constraint, max_tokens=20)
    assert outcome.unsent.num_forced_tokens + outcome.winner.num_forced_tokens == sum(
        choice.num_forced_tokens for choice in choices
    )
    assert outcome.unsent.num_forced_tokens > 0


# refusals


@pytest.mark.parametrize(("fields", "param"), [({"n": 2}, "n"), ({"max_tokens": 0}, "max_tokens")])
def test_what_a_vote_excludes_is_named(tiny: Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tiny.submit(request(strategy=SelfConsistency(n=4, answer=FullText()), **fields))
    assert caught.value.param == param


@pytest.mark.parametrize("n", [1, 4])
def test_a_hanging_pattern_fails_its_request_only(tiny: Engine, n: int) -> None:
    constraint = constrained(tiny, ConstraintSpec.regex("x{60}"))
    spec = SelfConsistency(n=n, answer=Pattern("((x|xx)+)+[yz]"))
    hanging = tiny.submit(request(strategy=spec, constraint=constraint, max_tokens=80))
    other = tiny.submit(request(n=2, max_tokens=60, ignore_eos=True))
    with pytest.raises(RequestError, match="takes longer") as caught:
        list(hanging)
    assert caught.value.param == "self_consistency.answer.regex"
    assert [choice.finish_reason for choice in collect(other, 2).choices] == ["length", "length"]
    assert tiny.stats().kv_cache_usage == 0


# the real model, on problems with a thought before the answer

EXAMPLES = [(5, 2), (4, 3), (6, 8)]
NUM_SAMPLES = 8


def word_problem(name: str, thing: str, verb: str, first: int, more: int) -> str:
    return f"{name} has {first} {thing} and {verb} {more} more. How many {thing} does {name} have?"


def word_problems(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """Chats that end with a problem, after examples of how to write the way to its answer."""
    draw = random.Random(4)
    messages = []
    for first, more in EXAMPLES:
        messages.append({"role": "user", "content": word_problem("Kim", "hats", "buys", first, more)})
        messages.append({"role": "assistant", "content": f"{first} + {more} = {first + more}"})
    names, verbs = ("Tom", "Anna", "Ben", "Mia", "Leo", "Sara"), ("buys", "finds", "gets")
    things = ("apples", "pens", "books", "coins", "shells", "cards")
    prompts = []
    for _ in range(count):
        numbers = draw.randrange(2, 10), draw.randrange(2, 10)
        question = word_problem(draw.choice(names), draw.choice(things), draw.choice(verbs), *numbers)
        prompts.append(prompt_token_ids(tokenizer, [*messages, {"role": "user", "content": question}]))
    return prompts


def last_number(text: str) -> str | None:
    """The last run of digits: all the numbers there are in sums of small ones."""
    runs = "".join(letter if letter.isdecimal() else " " for letter in text).split()
    return str(int(runs[-1])) if runs else None


def test_votes_on_word_problems(engine: Engine) -> None:
    """Winner and returned text are those of all samples; where these mostly agree, over a quarter is saved."""
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0.5, "stop": ("\n",)}
    spec = SelfConsistency(n=NUM_SAMPLES, answer=LastNumber())
    prompts = list(enumerate(word_problems(engine.tokenizer, 40)))
    saved = []
    for start in range(0, len(prompts), 4):
        some = [{**fields, "prompt": prompt, "seed": seed} for seed, prompt in prompts[start : start + 4]]
        drawn = [engine.submit(request(n=NUM_SAMPLES, **one)) for one in some]
        votes = [engine.submit(request(strategy=spec, **one)) for one in some]
        for choices, outcome in zip(
            [collect(stream, NUM_SAMPLES).choices for stream in drawn],
            [outcome_of(stream) for stream in votes],
            strict=True,
        ):
            answers = [last_number(choice.text) for choice in choices]
            winner, index = recount(answers, [1.0] * NUM_SAMPLES)
            assert (outcome.vote.answer, outcome.vote.sample) == (winner, index)
            assert outcome.winner == choices[index]
            spent = sum(len(choice.token_ids) for choice in choices[: outcome.vote.num_finished])
            assert outcome.vote.num_tokens == spent
            if answers.count(winner) >= NUM_SAMPLES * 3 / 4:
                saved.append(1 - spent / sum(len(choice.token_ids) for choice in choices))
    assert len(saved) >= 10, "the model mostly agrees with itself on some of the problems"
    assert sum(saved) / len(saved) >= 0.25
