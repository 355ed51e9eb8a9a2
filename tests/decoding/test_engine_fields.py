"""Every field of a request changes the answer as its name says, or is refused by name."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cadenza.decoding import (
    Engine,
    EngineConfig,
    GenerationRequest,
    PromptDone,
    RequestError,
    SamplingParams,
    TokenLogprob,
)
from cadenza.decoding.completion import Completion, CompletionChoice, collect
from cadenza.models import LoadedModel, ModelError

PROMPT = "The old clock on the wall had stopped at ten past four, and nobody in the house"


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_gb=0.001)
    with Engine(tiny_model, config) as running:
        yield running


def answer(engine: Engine, prompt: Any = PROMPT, *, cache_salt: str = "", **fields: Any) -> Completion:
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **fields})
    request = GenerationRequest(
        request_id="test", prompt_token_ids=tuple(ids), sampling=sampling, cache_salt=cache_salt
    )
    return collect(engine.submit(request), sampling.n)


def choice(engine: Engine, prompt: Any = PROMPT, **fields: Any) -> CompletionChoice:
    return answer(engine, prompt, **fields).choices[0]


# refusals

BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 250}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("min_tokens", {"min_tokens": 250, "max_tokens": None}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("top_k", {"top_k": -2}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.01}),
    ("top_p", {"top_p": math.nan}),
    ("min_p", {"min_p": -0.1}),
    ("min_p", {"min_p": 1.1}),
    ("typical_p", {"typical_p": 0.0}),
    ("typical_p", {"typical_p": 2.0}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": math.inf}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("presence_penalty", {"presence_penalty": math.nan}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("logit_bias", {"logit_bias": {5: 101.0}}),
    ("logit_bias", {"logit_bias": {5: math.nan}}),
    ("logit_bias", {"logit_bias": {49152: 1.0}}),
    ("logit_bias", {"logit_bias": {-1: 1.0}}),
    ("bad_words", {"bad_words": ("a", "")}),
    ("allowed_token_ids", {"allowed_token_ids": ()}),
    ("allowed_token_ids", {"allowed_token_ids": (3, 49152)}),
    ("stop", {"stop": ("",)}),
    ("stop_token_ids", {"stop_token_ids": (-1,)}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": -(2**63) - 1}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("prompt", {"prompt": ()}),
    ("prompt", {"prompt": (5, 49152)}),
    ("prompt", {"prompt": (5, -1)}),
    ("prompt", {"prompt": (5,) * 256}),
    ("prompt", {"prompt": (5,) * 257, "max_tokens": 0}),
]


@pytest.mark.parametrize(("param", "fields"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name(param: str, fields: dict[str, Any], tiny: Engine):
    with pytest.raises(RequestError) as caught:
        answer(tiny, **fields)
    assert caught.value.param == param
    assert "\n" not in str(caught.value)
    assert tiny.stats().kv_cache_usage == 0


def test_too_much_for_the_context_has_its_code(tiny: Engine):
    for fields in ({"prompt": (5,) * 256}, {"max_tokens": 250}):
        with pytest.raises(RequestError, match="256 tokens") as caught:
            answer(tiny, **fields)
        assert caught.value.code == "context_length_exceeded"


def test_an_unknown_field_is_refused(tiny: Engine):
    with pytest.raises(TypeError, match="temprature"):
        tiny.generate("Hello", temprature=1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_num_seqs": 0},
        {"block_size": 24},
        {"max_num_batched_tokens": 71},
        {"max_queue": 0},
        {"max_num_seqs": 8, "kv_cache_memory_gb": 1e-6},
    ],
)
def test_a_bad_configuration_is_refused(fields: dict[str, Any], tiny_model: LoadedModel):
    with pytest.raises(ModelError):
        Engine(tiny_model, EngineConfig(**{"max_num_seqs": 8, **fields}))


# length and ends


def test_max_tokens_0_only_scores_the_prompt(tiny: Engine):
    before = tiny.stats()
    found = answer(tiny, max_tokens=0, n=2, prompt_logprobs=1)
    assert [(c.text, c.token_ids, c.finish_reason) for c in found.choices] == [("", [], "length")] * 2
    assert found.prompt is not None
    assert found.prompt.logprobs is not None
    assert len(found.prompt.logprobs) == found.prompt.num_prompt_tokens == len(tiny.tokenizer.encode(PROMPT))
    after = tiny.stats()
    assert after.kv_cache_usage == 0
    assert after.generation_tokens_total == before.generation_tokens_total
    assert after.prompt_tokens_total == before.prompt_tokens_total + found.prompt.num_prompt_tokens


def test_a_prompt_may_fill_the_context_if_it_is_only_scored(tiny: Engine):
    found = answer(tiny, (5,) * 256, max_tokens=0)
    assert found.choices[0].finish_reason == "length"


def test_without_max_tokens_an_answer_runs_to_the_end_of_the_context(tiny: Engine):
    found = choice(tiny, (5,) * 200, max_tokens=None, ignore_eos=True)
    assert (len(found.token_ids), found.finish_reason) == (56, "length")


def test_eos_ends_a_choice_unseen(tiny: Engine):
    eos = tiny.model.eos_token_ids[0]
    found = choice(tiny, logit_bias={eos: 100.0})
    assert (found.text, found.token_ids, found.finish_reason, found.stop_reason) == ("", [eos], "stop", None)


def test_ignore_eos_goes_on(tiny: Engine):
    eos = tiny.model.eos_token_ids[0]
    found = choice(tiny, logit_bias={eos: 100.0}, ignore_eos=True)
    assert (found.token_ids, found.finish_reason) == ([eos] * 8, "length")
    shown = choice(tiny, logit_bias={eos: 100.0}, ignore_eos=True, skip_special_tokens=False)
    assert (found.text, shown.text) == ("", tiny.tokenizer.token_string(eos) * 8)


def test_a_stop_id_ends_a_choice_and_is_named(tiny: Engine):
    free = choice(tiny)
    stop_id = free.token_ids[3]
    length = free.token_ids.index(stop_id) + 1
    found = choice(tiny, stop_token_ids=(stop_id,))
    assert (found.token_ids, found.finish_reason) == (free.token_ids[:length], "stop")
    assert found.stop_reason == stop_id
    assert found.text == tiny.tokenizer.decode(free.token_ids[: length - 1])
    included = choice(tiny, stop_token_ids=(stop_id,), include_stop_str_in_output=True)
    assert included.text == tiny.tokenizer.decode(free.token_ids[:length])


def test_min_tokens_holds_off_every_end(tiny: Engine):
    eos = tiny.model.eos_token_ids[0]
    stop_id = choice(tiny).token_ids[0]
    by_eos = choice(tiny, logit_bias={eos: 100.0}, min_tokens=5)
    assert len(by_eos.token_ids) == 6
    assert by_eos.token_ids.index(eos) == 5
    by_id = choice(tiny, stop_token_ids=(stop_id,), logit_bias={stop_id: 50.0}, min_tokens=3)
    assert (len(by_id.token_ids), by_id.token_ids.index(stop_id), by_id.stop_reason) == (4, 3, stop_id)
    text = choice(tiny, allowed_token_ids=(500,), min_tokens=4, stop=(tiny.tokenizer.token_string(500),))
    assert (len(text.token_ids), text.finish_reason) == (4, "stop")


def test_a_stop_string_ends_a_choice_and_is_named(engine: Engine):
    free = choice(engine, max_tokens=12)
    stop = free.text[9:14]  # somewhere inside of words
    found = choice(engine, max_tokens=12, stop=("never seen", stop))
    at = free.text.index(stop)
    assert (found.text, found.finish_reason, found.stop_reason) == (free.text[:at], "stop", stop)
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
    included = choice(engine, max_tokens=12, stop=(stop,), include_stop_str_in_output=True)
    assert included.text == free.text[: at + len(stop)]


# which tokens


def test_bad_words_do_not_appear(engine: Engine):
    free = choice(engine, max_tokens=12)
    words = [word for word in free.text.replace(".", " ").split() if word.isalpha()][:3]
    assert len(words) == 3
    found = choice(engine, max_tokens=12, bad_words=tuple(words))
    assert not set(words) & set(found.text.replace(".", " ").replace(",", " ").split())


def test_only_allowed_tokens_appear(tiny: Engine):
    allowed = (300, 301, 302)
    found = choice(tiny, allowed_token_ids=allowed, temperature=1.0, seed=1, max_tokens=30)
    assert set(found.token_ids) == set(allowed)


def test_logit_bias_forces_and_prevents(tiny: Engine):
    assert choice(tiny, logit_bias={777: 100.0}).token_ids == [777] * 8
    first = choice(tiny).token_ids[0]
    assert first not in choice(tiny, logit_bias={first: -100.0}).token_ids


def test_penalties_end_a_repetition(tiny: Engine):
    """Between two tokens, a penalty on what was said makes the answer alternate."""
    pair = {"allowed_token_ids": (10, 11), "max_tokens": 12}
    once = {"logit_bias": {10: 100.0}, **pair}
    assert set(choice(tiny, **once).token_ids) == {10}
    plain = choice(tiny, **pair, temperature=0.0)
    for penalty in ({"frequency_penalty": 2.0}, {"frequency_penalty": -2.0}):
        found = choice(tiny, **pair, **penalty)
        counts = sorted((found.token_ids.count(10), found.token_ids.count(11)))
        assert counts[0] >= 3 if penalty["frequency_penalty"] > 0 else counts == [0, 12]
    assert plain.finish_reason == "length"


def test_a_seed_is_an_answer_and_no_seed_is_a_new_one(tiny: Engine):
    def sampled(**fields: Any) -> list[int]:
        return choice(tiny, temperature=1.0, max_tokens=10, **fields).token_ids

    assert sampled(seed=7) == sampled(seed=7)
    assert sampled(seed=7) != sampled(seed=8)
    assert sampled() != sampled()  # equal by chance less than once in 10^10


def test_the_engines_seed_makes_requests_without_one_reproducible(tiny_model: LoadedModel):
    found = []
    for _ in range(2):
        config = EngineConfig(max_num_seqs=4, kv_cache_memory_gb=0.001, seed=11)
        with Engine(tiny_model, config) as engine:
            found.append([choice(engine, temperature=1.0, max_tokens=6).token_ids for _ in range(2)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# several choices


def test_more_choices_than_fit_into_a_batch(tiny: Engine, tiny_model: LoadedModel):
    fields: dict[str, Any] = {"n": 7, "temperature": 1.0, "seed": 3, "logprobs": 1, "ignore_eos": True}
    config = EngineConfig(max_num_seqs=2, kv_cache_memory_gb=0.001)
    with Engine(tiny_model, config) as narrow:
        few_at_a_time = answer(narrow, **fields)
        assert narrow.stats().kv_cache_usage == 0
    together = answer(tiny, **fields)
    assert few_at_a_time.choices == together.choices
    assert len({tuple(each.token_ids) for each in together.choices}) == 7
    assert [each.finish_reason for each in together.choices] == ["length"] * 7


def test_choices_end_on_their_own(tiny: Engine):
    eos = tiny.model.eos_token_ids[0]
    found = answer(tiny, n=6, temperature=1.0, seed=2, max_tokens=40, allowed_token_ids=(400, 401, 402, eos))
    lengths = [len(each.token_ids) for each in found.choices]
    assert len(set(lengths)) > 1
    for each in found.choices:
        assert (each.finish_reason == "stop") == (each.token_ids[-1] == eos)
        assert eos not in each.token_ids[:-1]


# prompt log-probabilities


@pytest.fixture(scope="module")
def scored(reference: Any, engine: Engine) -> tuple[list[int], torch.Tensor]:
    """A prompt of 150 tokens, and transformers' log-probabilities of what follows each."""
    ids = engine.tokenizer.encode(PROMPT * 9)[:150]
    with torch.inference_mode():
        return ids, reference(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def test_prompt_logprobs_equal_transformers(engine: Engine, scored: tuple[list[int], torch.Tensor]):
    ids, log_probs = scored
    answer(engine, ids, max_tokens=1)  # a warm prefix cache must not hide what has to be computed
    found = answer(engine, ids, max_tokens=0, prompt_logprobs=3).prompt
    check_prompt(found, ids, log_probs, num_top=3)


def test_prompt_logprobs_in_small_steps_equal_those_in_one(tiny: Engine, tiny_model: LoadedModel):
    ids = list(range(1000, 1200))
    with Engine(tiny_model, EngineConfig(max_num_seqs=2, kv_cache_memory_gb=0.001)) as wide:
        at_once = answer(wide, ids, max_tokens=1, prompt_logprobs=2)
    assert answer(tiny, ids, max_tokens=1, prompt_logprobs=2) == at_once


def test_a_preemption_in_the_middle_of_the_prompt_scores_no_token_twice(tiny_model: LoadedModel):
    """Steps are taken by hand: 64 tokens, then the branch loses its blocks, then all again."""
    ids = list(range(1000, 1200))
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=66, kv_cache_memory_gb=0.001)
    with Engine(tiny_model, config) as engine:
        undisturbed = answer(engine, ids, max_tokens=2, prompt_logprobs=1)
        engine.reset_prefix_cache()
        core, original = engine._core, engine._core.step
        steps = iter(range(100))

        def step() -> None:
            original()
            if next(steps) == 1:
                core.scheduler._preempt(core.scheduler.running[-1])

        core.step = step  # type: ignore[method-assign]
        assert answer(engine, ids, max_tokens=2, prompt_logprobs=1) == undisturbed
        assert engine.stats().num_preemptions == 1


def check_prompt(found: PromptDone | None, ids: list[int], log_probs: torch.Tensor, *, num_top: int) -> None:
    assert found is not None
    assert found.logprobs is not None
    assert found.logprobs[0] is None
    assert len(found.logprobs) == len(ids)
    for item, token, expected in zip(found.logprobs[1:], ids[1:], log_probs, strict=False):
        assert isinstance(item, TokenLogprob)
        assert item.token_id == token
        assert item.logprob == pytest.approx(float(expected[token]), abs=1e-3)
        best = expected.topk(num_top).values.tolist()
        assert [value for _, value in item.top] == pytest.approx(best, abs=1e-3)
        assert all(value == pytest.approx(float(expected[other]), abs=1e-3) for other, value in item.top)
        higher = int((expected > expected[token] + 1e-3).sum())
        assert higher < item.rank <= int((expected > expected[token] - 1e-3).sum())


# the prefix cache


def test_equal_salts_share_and_different_ones_do_not(tiny: Engine):
    ids = list(range(2000, 2130))

    def num_cached(salt: str) -> int:
        found = answer(tiny, ids, cache_salt=salt).prompt
        assert found is not None
        return found.num_cached_tokens

    assert [num_cached(salt) for salt in ("a", "a", "b", "", "b")] == [0, 128, 0, 0, 128]


# for scripts


def test_generate_takes_text_ids_and_messages(tiny: Engine):
    ids = tiny.tokenizer.encode("Hello there")
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5}
    assert tiny.generate("Hello there", **fields) == tiny.generate(ids, **fields)
    messages = [{"role": "user", "content": "Hello there"}]
    rendered = tiny.tokenizer.encode(tiny.tokenizer.render_chat(messages), add_special_tokens=False)
    assert tiny.generate(messages, **fields) == tiny.generate(rendered, **fields)


def test_streamed_pieces_join_to_the_generated_text(tiny: Engine):
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    pieces = list(tiny.stream("Once upon", **fields))
    assert len(pieces) > 10
    assert all(pieces)
    assert "".join(pieces) == tiny.generate("Once upon", **fields).text


def test_a_batch_is_each_of_its_prompts(tiny: Engine):
    prompts = ["One", "Two words", "Three words, here"]
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 6, "n": 2}
    together = tiny.generate_batch(prompts, **fields)
    assert [each.choices for each in together] == [tiny.generate(p, **fields).choices for p in prompts]
    assert tiny.generate_batch([]) == []
