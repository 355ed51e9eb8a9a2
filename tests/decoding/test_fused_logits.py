"""The logits pipeline by kernels, in Triton's interpreter, against the one by torch, over one table of rows."""

import math
import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.decoding.dry import Breakers, Dry
from cadenza.decoding.logits import LogitsPipeline, LogprobsMode
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Candidates, Choice, Row

pytest.importorskip("triton")

from cadenza.decoding.fused_logits import FusedLogitsPipeline

NUM_COLUMNS, VOCAB_SIZE = 5003, 4999
NUM_LOGITS_ROWS = 6


def logits_of(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """The columns beyond the vocabulary are the largest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_LOGITS_ROWS, NUM_COLUMNS, generator=generator) * 3
    logits[:, VOCAB_SIZE:] = 50.0
    return logits.to(dtype)


def bitmask_of(num_rows: int) -> Tensor:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, (num_rows, -(-VOCAB_SIZE // 32)))
    return torch.from_numpy(words.astype(np.int32))


def row(number: int, **changes: Any) -> Row:
    names = {*Row.__dataclass_fields__} - {"sampling"}
    own = {name: value for name, value in changes.items() if name in names}
    sampling = {name: value for name, value in changes.items() if name not in names}
    return Row(
        **{
            "logits_row": number % NUM_LOGITS_ROWS,
            "sampling": SamplingParams(**sampling),
            "seed": 2**63 + number,
            "branch": number % 3,
            "prompt": [1, 2, 3, 4000],
            "generated": [7] * (number % 5) + [8, number],
            "banned": [],
            "num_logprobs": None,
            **own,
        }
    )


ROWS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}, {"temperature": 0.0, "num_logprobs": 0}],
    "drawn from all": [{}, {"temperature": 0.5}, {"temperature": 1.7, "num_logprobs": 5}],
    "truncated": [
        {"top_k": 5},
        {"top_p": 0.7, "num_logprobs": 3},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
        {"top_p": 0.999, "temperature": 3.0},
    ],
    "masked": [{"mask": 0}, {"mask": 1, "top_p": 0.8}, {"mask": 2, "temperature": 0.0, "num_logprobs": 2}],
    "allowed by a list": [
        {"allowed_token_ids": (5, 77, 4998)},
        {"allowed_token_ids": tuple(range(0, 3000, 7)), "mask": 1},
        {"allowed_token_ids": (5,), "temperature": 0.0},
    ],
    "edited": [
        {"repetition_penalty": 1.5, "temperature": 0.0},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "num_logprobs": 4},
        {"logit_bias": {17: 40.0, 18: -100.0}, "repetition_penalty": 0.7},
        {"banned": [7, 8, 9], "temperature": 0.0, "logit_bias": {8: 100.0}},
        {"dry": Dry(2.0, 1.75, 1, -1, Breakers()), "prompt": [5, 6, 7, 5, 6], "generated": [7, 5, 6]},
        {"repetition_penalty": 2.0, "mask": 3, "top_k": 3, "num_logprobs": 1},
    ],
    "beams": [
        {"candidates": Candidates(4, False)},
        {"candidates": Candidates(6, True), "mask": 0},
        {"candidates": Candidates(8, False), "mask": 2},
        {"candidates": Candidates(2, False), "repetition_penalty": 1.2},
    ],
    "what no kernel has": [
        {"typical_p": 0.5},
        {"mirostat": 2, "num_logprobs": 2},
        {"top_n_sigma": 1.0, "mask": 1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    ],
    "a vocabulary of its own": [
        {"num_tokens": 4000},
        {"num_tokens": 5003, "temperature": 0.0, "num_logprobs": 1},
    ],
    "explained": [{"explain": True}, {"explain": True, "temperature": 0.0, "logit_bias": {3: 100.0}}],
}


def both(
    rows: list[Row], logits: Tensor, bitmask: Tensor | None, mode: LogprobsMode = "raw_logprobs"
) -> tuple[list[Choice], list[Choice]]:
    """By torch from the same numbers in float32, and by kernels."""
    expected = LogitsPipeline(VOCAB_SIZE, mode, VOCAB_SIZE)(logits.float(), rows, bitmask)
    return expected, FusedLogitsPipeline(VOCAB_SIZE, mode, VOCAB_SIZE)(logits, rows, bitmask)


def assert_same(expected: Choice, actual: Choice) -> None:
    assert (actual.token_id, actual.decision) == (expected.token_id, expected.decision)
    assert (actual.mirostat_mu is None) == (expected.mirostat_mu is None)
    assert (actual.explanation is None) == (expected.explanation is None)
    assert [token for token, _ in actual.candidates] == [token for token, _ in expected.candidates]
    assert np.allclose([v for _, v in actual.candidates], [v for _, v in expected.candidates], atol=1e-4)
    if expected.logprob is None:
        assert actual.logprob is None
        return
    assert actual.logprob is not None
    assert actual.logprob.rank == expected.logprob.rank
    assert math.isclose(actual.logprob.logprob, expected.logprob.logprob, abs_tol=1e-4)
    for one, other in zip(actual.logprob.top, expected.logprob.top, strict=True):
        assert one[0] == other[0]
        assert math.isclose(one[1], other[1], abs_tol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_the_same_choices_as_by_torch(name, kernel_device):
    rows = [row(number, **changes) for number, changes in enumerate(ROWS[name])]
    logits = logits_of(torch.float32)
    for expected, actual in zip(*both(rows, logits.to(kernel_device), bitmask_of(4)), strict=True):
        assert_same(expected, actual)


def test_one_batch_of_everything_leaves_the_logits_as_they_are(kernel_device):
    rows = [row(number, **changes) for number, changes in enumerate(chain(*ROWS.values()))]
    random.Random(0).shuffle(rows)
    logits = logits_of(torch.float32, seed=1).to(kernel_device)
    before = logits.clone()
    for expected, actual in zip(*both(rows, logits, bitmask_of(4)), strict=True):
        assert_same(expected, actual)
    assert torch.equal(logits, before)


def test_logits_of_16_bits_with_their_ties(kernel_device):
    rows = [
        row(n, **changes) for n, changes in enumerate([*ROWS["greedy"], *ROWS["truncated"], *ROWS["beams"]])
    ]
    logits = logits_of(torch.bfloat16).to(kernel_device)
    for expected, actual in zip(*both(rows, logits, bitmask_of(4)), strict=True):
        assert_same(expected, actual)


def test_processed_logprobs_are_computed_by_torch(kernel_device):
    rows = [row(0, num_logprobs=2, top_k=5), row(1, top_k=5), row(2, temperature=0.0, num_logprobs=0)]
    logits = logits_of(torch.float32).to(kernel_device)
    for expected, actual in zip(*both(rows, logits, None, "processed_logprobs"), strict=True):
        assert_same(expected, actual)


def test_rows_that_nothing_is_left_of_have_no_token(kernel_device):
    logits = logits_of(torch.float32).to(kernel_device)
    logits[1] = torch.nan
    nothing = torch.zeros(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    rows = [row(0, mask=0, num_logprobs=1), row(1), row(2), row(0, mask=0, candidates=Candidates(2, True))]
    choices = FusedLogitsPipeline(VOCAB_SIZE, "raw_logprobs", VOCAB_SIZE)(logits, rows, nothing)
    assert [choice.token_id is None for choice in choices] == [True, True, False, True]
    assert choices[0].logprob is None
    assert choices[3].candidates == ()


def test_the_host_waits_once(kernel_device, monkeypatch):
    """Each of these would stop the host until the device is done. The interpreter calls none of them on tensors."""
    logits, bitmask = logits_of(torch.float32).to(kernel_device), bitmask_of(4)
    names = ("greedy", "drawn from all", "truncated", "masked", "allowed by a list")
    rows = [row(number, **changes) for number, changes in enumerate(chain(*(ROWS[name] for name in names)))]
    rows += [row(0, **ROWS["edited"][0]), row(1, **ROWS["beams"][0])]
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    FusedLogitsPipeline(VOCAB_SIZE, "raw_logprobs", VOCAB_SIZE)(logits, rows, bitmask)
    assert calls == ["cpu"]


def test_a_list_may_allow_tokens_beyond_the_step_s_masks(kernel_device):
    """An adapter adds them; the masks of others, which know the model's own vocabulary only, do not decide on them."""
    logits = logits_of(torch.float32).to(kernel_device)
    added = range(VOCAB_SIZE - VOCAB_SIZE % 32, NUM_COLUMNS)
    rows = [row(0, mask=0), row(1, num_tokens=NUM_COLUMNS, allowed_token_ids=tuple(added))]
    narrow = torch.full((1, VOCAB_SIZE // 32), -1, dtype=torch.int32)
    for expected, actual in zip(*both(rows, logits, narrow), strict=True):
        assert actual.token_id is not None
        assert_same(expected, actual)


def test_top_k_may_be_larger_than_32_bits(kernel_device):
    rows = [row(0, top_k=2**40), row(1, top_k=2**31, top_p=0.9)]
    for expected, actual in zip(*both(rows, logits_of(torch.float32).to(kernel_device), None), strict=True):
        assert_same(expected, actual)


def test_alternatives_are_tokens_where_fewer_are_possible_than_wanted(kernel_device):
    logits = logits_of(torch.float32).to(kernel_device)
    logits[0, 3:] = -torch.inf
    (choice,) = FusedLogitsPipeline(VOCAB_SIZE, "raw_logprobs", VOCAB_SIZE)(
        logits, [row(0, num_logprobs=5)], None
    )
    assert choice.logprob is not None
    assert sorted(token for token, _ in choice.logprob.top) == [0, 1, 2]
