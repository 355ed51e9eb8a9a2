"""Greedy answers of the real model against transformers' `generate`: same tokens, same log-probabilities."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cadenza.decoding import Engine
from cadenza.decoding.completion import Completion

NUM_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3
NEAR_TIE = 1e-3  # two tokens closer than this may change places with the order of summation

STORY = (
    "The lighthouse keeper wrote down the weather every evening, first the wind, then the height of the waves, "
    "and last of all the colour of the sky, because his grandfather had told him that the colour is what sailors "
    "remember. In forty years he missed a single day. "
)
NUMBERS = " ".join(str(number * number) for number in range(60))
PROMPTS = {
    "one token": "The",
    "short": "The capital of France is",
    "question": "Why is the sky blue?\n",
    "dialogue": '"Where were you last night?" she asked.\n"',
    "list": "Colours of the rainbow:\n1. Red\n2. Orange\n3.",
    "python": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "json": '{"name": "Ada", "born": 1815, "fields": ["mathematics", "',
    "html": "<!DOCTYPE html>\n<html>\n  <head>\n    <title>",
    "sql": "SELECT name, COUNT(*) FROM orders WHERE",
    "emoji": "Good morning 🌞🌻! Today we celebrate 🎉👩‍👩‍👧‍👦 and",
    "chinese": "床前明月光，疑是地上霜。",
    "japanese": "吾輩は猫である。名前はまだ無い。",
    "korean": "안녕하세요, 오늘 날씨는",
    "accents": "Élève, où êtes-vous allé à Noël ? Größe, señor, œuvre:",
    "digits": "3.14159265358979323846264338327950288419716939937510",
    "spaces": "\n\n        \t indented   text \n",
    "ends at a tile": STORY * 2,
    "crosses a tile": STORY * 3,
    "crosses two tiles": STORY * 5 + "In the forty-first year",
    "long digits": NUMBERS,
}


@dataclass(frozen=True)
class Expected:
    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]
    """How far the best token's logit is above the second best's, at each step."""


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> dict[str, list[int]]:
    ids = {name: engine.tokenizer.encode(text) for name, text in PROMPTS.items()}
    ids["ends at a tile"] = ids["crosses a tile"][:128]
    return ids


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: dict[str, list[int]]) -> dict[str, Expected]:
    """By `generate`, in batches of similar length to save time; each prompt padded on its left."""
    by_length = sorted(prompts, key=lambda name: len(prompts[name]))
    found: dict[str, Expected] = {}
    for names in (by_length[:10], by_length[10:16], by_length[16:]):
        found |= zip(names, by_transformers(reference, [prompts[name] for name in names]), strict=True)
    return found


@pytest.fixture(scope="module")
def together(engine: Engine, prompts: dict[str, list[int]]) -> dict[str, Completion]:
    return dict(zip(prompts, greedy(engine, list(prompts.values())), strict=True))


@torch.inference_mode()
def by_transformers(model: Any, prompts: list[list[int]]) -> list[Expected]:
    width = max(map(len, prompts))
    output = model.generate(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(output.logits, dim=1).float()  # [prompts, NUM_TOKENS, V]
    tokens = output.sequences[:, width:]
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    best = logits.topk(2).values
    margins = best[:, :, 0] - best[:, :, 1]
    return [Expected(*row) for row in zip(tokens.tolist(), logprobs.tolist(), margins.tolist(), strict=True)]


def greedy(engine: Engine, prompts: list[list[int]]) -> list[Completion]:
    engine.reset_prefix_cache()
    return engine.generate_batch(prompts, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)


def test_the_prompts_are_as_varied_as_their_names(prompts: dict[str, list[int]]):
    lengths = {name: len(ids) for name, ids in prompts.items()}
    assert len(prompts) == 20
    assert lengths["one token"] == 1
    assert lengths["ends at a tile"] == 128
    assert 128 < lengths["crosses a tile"] <= 192
    assert lengths["crosses two tiles"] > 256
    assert lengths["long digits"] > 128


@pytest.mark.parametrize("name", PROMPTS)
def test_a_batch_gives_the_tokens_and_logprobs_of_generate(
    name: str, together: dict[str, Completion], expected: dict[str, Expected]
):
    choice, want = together[name].choices[0], expected[name]
    assert min(want.margins) > NEAR_TIE, (
        "a near tie: this prompt cannot tell right from wrong; choose another"
    )
    assert choice.token_ids == want.token_ids
    assert [item.token_id for item in choice.logprobs] == want.token_ids
    assert [item.logprob for item in choice.logprobs] == pytest.approx(want.logprobs, abs=LOGPROB_TOLERANCE)
    assert all(item.rank == 1 and item.top == ((item.token_id, item.logprob),) for item in choice.logprobs)


@pytest.mark.parametrize("name", ["one token", "python", "emoji", "ends at a tile", "crosses two tiles"])
def test_alone_equals_in_the_batch_to_the_last_bit(
    name: str, engine: Engine, prompts: dict[str, list[int]], together: dict[str, Completion]
):
    (alone,) = greedy(engine, [prompts[name]])
    assert alone.choices == together[name].choices
