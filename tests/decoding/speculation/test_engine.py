"""What speculation saves and what it reports; that it takes nothing from others; who cannot draft."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.stats

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, RequestStream, SamplingParams
from cadenza.decoding.completion import Completion, CompletionChoice, collect
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.models import LoadedModel, ModelError

PROMPT = (*range(1000, 1080), *range(1000, 1030))
FEW = tuple(range(300, 312))


def submit(
    engine: Engine, prompt: tuple[int, ...] = PROMPT, constraint: Any = None, **sampling: Any
) -> RequestStream:
    params = SamplingParams(**{"max_tokens": 60, "seed": 5, "ignore_eos": constraint is None, **sampling})
    return engine.submit(
        GenerationRequest(request_id="test", prompt_token_ids=prompt, sampling=params, constraint=constraint)
    )


def ask(engine: Engine, **options: Any) -> list[CompletionChoice]:
    return collect(submit(engine, **options), options.get("n", 1)).choices


@dataclasses.dataclass(frozen=True)
class Counts:
    drafts: int
    drafted: int
    accepted: int


def counted(engine: Engine, **options: Any) -> Counts:
    """What speculation has done for one request."""

    def now() -> tuple[int, int, int]:
        stats = engine.stats()
        return (
            stats.spec_decode_num_drafts,
            stats.spec_decode_num_draft_tokens,
            stats.spec_decode_num_accepted_tokens,
        )

    before = now()
    ask(engine, **options)
    return Counts(*(after - earlier for after, earlier in zip(now(), before, strict=True)))


# what is accepted


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 30}]
)
def test_a_model_that_drafts_for_itself_is_always_right(same_model: Engine, options: dict[str, Any]) -> None:
    counts = counted(same_model, **options)
    assert counts.drafted > 40
    assert counts.accepted == counts.drafted


def test_it_is_right_for_branches_that_share_their_prompts_last_block(same_model: Engine) -> None:
    assert len(PROMPT) % 16 != 0
    counts = counted(same_model, n=4, max_tokens=20)
    assert counts.accepted == counts.drafted > 20


def test_it_is_right_under_a_constraint_too(same_model: Engine) -> None:
    """It draws under the same masks; runs without alternative come without being drafted."""
    schema = ConstraintSpec.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 9})
    constraint = same_model.constraints.compile(schema).result()
    counts = counted(same_model, constraint=constraint, max_tokens=50, logprobs=0)
    assert counts.drafted > 20
    assert counts.accepted >= 0.9 * counts.drafted


def test_another_random_model_is_mostly_wrong_and_soon_believed_less(other_model: Engine) -> None:
    counts = counted(other_model, temperature=1.0)
    assert counts.drafts > 0
    assert counts.accepted < 0.2 * counts.drafted


def test_a_lookup_is_right_where_the_answer_repeats_itself(ngram: Engine) -> None:
    counts = counted(ngram, allowed_token_ids=(300,), temperature=1.0)
    assert counts.accepted > 40
    assert counted(ngram, temperature=1.0, n=1).accepted < 10


def test_a_model_as_large_as_the_one_it_drafts_for_is_not_asked(tiny_model: LoadedModel) -> None:
    config = EngineConfig(kv_cache_memory_gb=0.02, speculative="itself")
    with Engine(tiny_model, config, draft=tiny_model) as engine:
        assert counted(engine) == Counts(0, 0, 0)


@pytest.mark.parametrize("options", [{"mirostat": 2}, {"mirostat": 1}])
def test_samplers_with_a_memory_are_left_alone(ngram: Engine, options: dict[str, Any]) -> None:
    assert counted(ngram, **options) == Counts(0, 0, 0)
    assert counted(ngram, **options, temperature=0.0).drafts > 0


class Steps:
    """Counts forward passes."""

    def __init__(self, engine: Engine) -> None:
        self._core = engine._core
        self._runner = engine._core._runner
        self.number = 0

    def __call__(self, *args: Any) -> Any:
        self.number += 1
        return self._runner(*args)

    def __enter__(self) -> "Steps":
        self._core._runner = self  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._core._runner = self._runner


def test_accepted_drafts_save_steps(plain: Engine, same_model: Engine) -> None:
    with Steps(plain) as one_by_one:
        expected = ask(plain)
    with Steps(same_model) as steps:
        assert ask(same_model) == expected
    assert one_by_one.number == 60 + (-(-len(PROMPT) // 512)) - 1
    assert steps.number <= 1 + -(-59 // 4)


def test_tokens_that_a_constraint_has_decided_on_are_scored_in_one_step(plain: Engine) -> None:
    """Without a drafter, too: their log-probabilities are all that they wait for."""
    constraint = plain.constraints.compile(
        ConstraintSpec.regex(r"a{1}(one two three four five six){4}")
    ).result()
    with Steps(plain) as steps:
        (choice,) = ask(plain, constraint=constraint, logprobs=1)
    assert choice.num_forced_tokens > 20
    assert len(choice.logprobs) == len(choice.token_ids)
    assert steps.number < 8


# exactness


def test_sampled_tokens_are_distributed_as_they_should_be(ngram: Engine, plain: Engine) -> None:
    """The third token of 400 answers, against the model's own probabilities for it.

    All allowed tokens occur in the prompt, and drafts are accepted and rejected; chi-square at 0.1 %, fixed seeds."""
    prompt = (300, 301, 300, 302, 300, 303, 300, 301)
    options: dict[str, Any] = {"allowed_token_ids": (300, 301, 302, 303), "temperature": 1.0, "max_tokens": 3}
    before = ngram.stats()
    answers = []
    for first in range(0, 400, 4):  # few at a time, as more are not drafted for
        streams = [submit(ngram, prompt=prompt, **options, seed=first + seed) for seed in range(4)]
        answers += [collect(stream, 1).choices[0].token_ids for stream in streams]
    after = ngram.stats()
    assert after.spec_decode_num_draft_tokens > before.spec_decode_num_draft_tokens
    observed = Counter(answer[2] for answer in answers)
    expected = _third_token(plain, prompt, options["allowed_token_ids"])
    result = scipy.stats.chisquare(
        [observed[token] for token in expected], [400 * p for p in expected.values()]
    )
    assert result.pvalue > 0.001


def _third_token(engine: Engine, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> dict[int, float]:
    """By the scores of all ways to get there, as prompts."""
    paths = list(itertools.product(tokens, repeat=3))
    streams = [submit(engine, prompt=prompt + path, max_tokens=0, prompt_logprobs=0) for path in paths]
    scores = {path: _last_scores(collect(stream, 1)) for path, stream in zip(paths, streams, strict=True)}
    probabilities = dict.fromkeys(tokens, 0.0)
    for path in paths:
        weight = 1.0
        for at in range(3):
            siblings = [(*path[:at], token, *path[at + 1 :]) for token in tokens]
            total = sum(math.exp(scores[sibling][at]) for sibling in siblings)
            weight *= math.exp(scores[path][at]) / total
        probabilities[path[2]] += weight
    return probabilities


def _last_scores(completion: Completion) -> list[float]:
    assert completion.prompt is not None
    assert completion.prompt.logprobs is not None
    return [score.logprob for score in completion.prompt.logprobs[-3:] if score is not None]


# room


@pytest.fixture(scope="module")
def cramped(tiny_model: LoadedModel) -> Iterator[Engine]:
    """Blocks for some 350 tokens of the model and its draft model, small steps."""
    config = EngineConfig(
        max_num_seqs=16,
        max_num_batched_tokens=80,
        kv_cache_memory_gb=0.000175,
        speculative="itself",
        num_speculative_tokens=4,
    )
    with Engine(tiny_model, config, draft=tiny_model) as running:
        drafting: Any = running._core._speculator._drafter
        drafting._pass_cost = 0.0
        yield running


def test_preempted_branches_are_drafted_for_again(plain: Engine, cramped: Engine) -> None:
    assert cramped.num_kv_tokens < 400
    options = [{"seed": seed, "max_tokens": 60, "logprobs": 1} for seed in range(5)]
    expected = [ask(plain, **each) for each in options]
    before = cramped.stats()
    streams = [submit(cramped, **each) for each in options]
    assert [collect(stream, 1).choices for stream in streams] == expected
    after = cramped.stats()
    assert after.num_preemptions > before.num_preemptions
    drafted = after.spec_decode_num_draft_tokens - before.spec_decode_num_draft_tokens
    accepted = after.spec_decode_num_accepted_tokens - before.spec_decode_num_accepted_tokens
    assert accepted >= 0.9 * drafted > 0, "after a preemption the draft model's cache must be made anew"
    assert after.kv_cache_usage == 0


def test_the_prefix_cache_holds_the_draft_models_part(same_model: Engine) -> None:
    prompt = tuple(range(2000, 2200))
    cold = counted(same_model, prompt=prompt, max_tokens=20)
    hits = same_model.stats().prefix_cache_hits
    warm = counted(same_model, prompt=prompt, max_tokens=20)
    assert same_model.stats().prefix_cache_hits == hits + 192
    assert warm == cold
    assert warm.accepted == warm.drafted > 0


def test_an_aborted_request_leaves_no_block_behind(drafted: Engine) -> None:
    stream = submit(drafted, allowed_token_ids=FEW, max_tokens=140)
    for number, _ in enumerate(stream):
        if number == 10:
            break
    stream.abort()
    ask(drafted, max_tokens=2)
    assert drafted.stats().kv_cache_usage == 0
    drafter: Any = drafted._core._speculator._drafter
    held = drafter._lookups if hasattr(drafter, "_lookups") else drafter._shadows
    assert not held


# who may draft


def test_a_draft_model_needs_the_same_vocabulary(tiny_model: LoadedModel) -> None:
    class Shifted:
        vocab_size = tiny_model.tokenizer.vocab_size

        def token_bytes(self, token_id: int) -> bytes:
            return tiny_model.tokenizer.token_bytes((token_id + 1) % self.vocab_size)

    strange: Any = Shifted()
    draft = dataclasses.replace(tiny_model, tokenizer=strange, name="stranger")
    with pytest.raises(ModelError, match=r"stranger cannot draft for .*: their vocabularies differ"):
        Engine(tiny_model, EngineConfig(kv_cache_memory_gb=0.01, speculative="stranger"), draft=draft)


def test_a_model_that_is_not_there_is_named(tiny_model: LoadedModel) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        Engine(tiny_model, EngineConfig(kv_cache_memory_gb=0.01, speculative="./no-such-model"))


def test_at_least_one_token_must_be_drafted() -> None:
    with pytest.raises(ModelError, match="num_speculative_tokens must be at least 1, got 0"):
        EngineConfig(speculative="ngram", num_speculative_tokens=0)


def test_a_shorter_context_of_the_draft_model_only_ends_its_drafts(
    plain: Engine, tiny_model: LoadedModel
) -> None:
    draft = dataclasses.replace(tiny_model, max_model_len=130)
    config = EngineConfig(kv_cache_memory_gb=0.02, speculative="itself", num_speculative_tokens=4)
    with Engine(tiny_model, config, draft=draft) as engine:
        drafting: Any = engine._core._speculator._drafter
        drafting._pass_cost = 0.0
        assert ask(engine, max_tokens=100) == ask(plain, max_tokens=100)
        assert 0 < engine.stats().spec_decode_num_accepted_tokens < 25
        long = tuple(range(2000, 2150))
        assert ask(engine, prompt=long, max_tokens=20) == ask(plain, prompt=long, max_tokens=20)
