"""A seeded sampled request gives the same tokens and log-probabilities, to the last bit, whatever runs beside it.

Everything is compared with `==`: what the request gave alone, from a cold cache, is the truth of this file.
"""

from collections.abc import Iterator

import pytest

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.completion import Completion, CompletionChoice, collect
from cadenza.decoding.request import GenerationRequest, PromptDone, SamplingParams
from cadenza.models import LoadedModel

NUM_TOKENS = 16
SUBJECT = SamplingParams(
    max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.9, seed=1234, logprobs=2, ignore_eos=True
)
TEXT = (
    "In the spring of that year the river rose higher than anyone could remember. The mill stood in water up to its "
    "second window, and the miller's children rowed to school. Old people said that the ice in the mountains had "
    "waited for the new bridge, which was only finished in February, and that it would not rest before the bridge "
    "was gone. The engineer laughed at them; he had measured the river for nine years, in drought and in flood, and "
    "knew every stone of it by its number. On the last evening of March he went out to read the gauge, took his dog "
    "and a lamp with him, and said that he would be back for supper. What came back was the dog."
)
LENGTHS = [1, 129, 5, 17, 64, 33, 3, 26, 20, 9, 65, 12, 40, 63, 30, 7]


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> list[int]:
    """100 tokens: one whole tile, which the prefix cache keeps, and a part of another."""
    return engine.tokenizer.encode(TEXT)[:100]


@pytest.fixture(scope="module")
def others(engine: Engine) -> list[list[int]]:
    """16 prompts of different lengths and content."""
    tokens = engine.tokenizer.encode(TEXT + TEXT[::-1])
    return [tokens[start : start + length] for start, length in enumerate(LENGTHS, start=1)]


@pytest.fixture(scope="module")
def alone(engine: Engine, prompt: list[int]) -> CompletionChoice:
    engine.reset_prefix_cache()
    (choice,) = answer(engine, prompt, SUBJECT).choices
    assert len(choice.token_ids) == len(choice.logprobs) == NUM_TOKENS
    assert any(item.rank > 1 for item in choice.logprobs), (
        "sampling that only ever takes the best token tells little"
    )
    return choice


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> Completion:
    return collect(engine.submit(request(prompt, params)), params.n)


def request(prompt: list[int], params: SamplingParams, priority: int = 0) -> GenerationRequest:
    return GenerationRequest(
        request_id="test", prompt_token_ids=tuple(prompt), sampling=params, priority=priority
    )


def beside(
    engine: Engine, prompt: list[int], others: list[list[int]], *, max_tokens: int, priority: int = 0
) -> CompletionChoice:
    """The subject's answer with half of the others submitted before it and half after."""
    noise = [
        SamplingParams(
            max_tokens=max_tokens, temperature=0.8, top_k=40 + number, seed=number, ignore_eos=True
        )
        for number in range(len(others))
    ]
    half = len(others) // 2
    streams = [engine.submit(request(*pair)) for pair in zip(others[:half], noise[:half], strict=True)]
    subject = engine.submit(request(prompt, SUBJECT, priority))
    streams += [engine.submit(request(*pair)) for pair in zip(others[half:], noise[half:], strict=True)]
    completion = collect(subject, 1)
    for stream in streams:
        assert collect(stream, 1).choices[0].finish_reason == "length"
    return completion.choices[0]


def test_among_16_others(engine: Engine, prompt: list[int], others: list[list[int]], alone: CompletionChoice):
    engine.reset_prefix_cache()
    assert beside(engine, prompt, others, max_tokens=NUM_TOKENS) == alone


def test_with_a_warm_prefix_cache(engine: Engine, prompt: list[int], alone: CompletionChoice):
    engine.reset_prefix_cache()
    hits = engine.stats().prefix_cache_hits
    cold = answer(engine, prompt, SUBJECT)
    assert engine.stats().prefix_cache_hits == hits
    warm = answer(engine, prompt, SUBJECT)
    assert engine.stats().prefix_cache_hits == hits + 64
    assert isinstance(cold.prompt, PromptDone)
    assert isinstance(warm.prompt, PromptDone)
    assert (cold.prompt.num_cached_tokens, warm.prompt.num_cached_tokens) == (0, 64)
    assert cold.choices == warm.choices == [alone]


def test_the_first_of_three_choices_is_the_only_one_of_one(
    engine: Engine, prompt: list[int], alone: CompletionChoice
):
    three = answer(engine, prompt, _changed(n=3)).choices
    assert three[0] == alone
    assert len({tuple(choice.token_ids) for choice in three}) == 3


def test_another_seed_gives_other_tokens(engine: Engine, prompt: list[int], alone: CompletionChoice):
    assert answer(engine, prompt, _changed(seed=1235)).choices[0].token_ids != alone.token_ids


def test_log_probabilities_do_not_change_the_draw(engine: Engine, prompt: list[int], alone: CompletionChoice):
    silent = answer(engine, prompt, _changed(logprobs=None)).choices[0]
    scored = answer(engine, prompt, _changed(prompt_logprobs=1)).choices[0]
    assert silent.token_ids == alone.token_ids
    assert scored == alone


def _changed(**fields: object) -> SamplingParams:
    values = {name: getattr(SUBJECT, name) for name in SamplingParams.__dataclass_fields__}
    return SamplingParams(**{**values, **fields})


@pytest.fixture(scope="module")
def small_steps(engine: Engine, smollm2: LoadedModel) -> Iterator[Engine]:
    """Two tiles per step at most, and blocks for some 300 tokens: prompts in pieces, branches preempted.

    Shares the packed weights of `engine`: the model's attention was replaced already, and is stateless.
    """
    config = EngineConfig(max_num_seqs=20, max_num_batched_tokens=128, kv_cache_memory_gb=0.013)
    with Engine(smollm2, config) as running:
        yield running


def test_with_small_steps(small_steps: Engine, prompt: list[int], alone: CompletionChoice):
    assert answer(small_steps, prompt, SUBJECT).choices == [alone]


def test_preempted_and_recomputed(
    small_steps: Engine, prompt: list[int], others: list[list[int]], alone: CompletionChoice
):
    """The subject has the worst priority, so that it is the first to give its blocks up."""
    assert small_steps.num_kv_tokens < 320
    before = small_steps.stats().num_preemptions
    choice = beside(small_steps, prompt, others[:6], max_tokens=NUM_TOKENS, priority=9)
    assert small_steps.stats().num_preemptions > before
    assert choice == alone
    assert small_steps.stats().kv_cache_usage == 0
