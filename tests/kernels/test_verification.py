"""Verification of drafts against its definition, in Triton's interpreter and, where there is one, on a GPU."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.kernels.noise import all_words, gumbel

pytest.importorskip("triton")

from cadenza.kernels import verification
from cadenza.kernels.verification import verify, verify_reference


def truth(tokens: list[int], drafts: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
    """Row by row, in words of the definition."""
    num_accepted, is_reached = [], [0] * len(tokens)
    for start, end in pairwise(starts):
        row = start
        while row < end and tokens[row] == drafts[row] and drafts[row] >= 0:
            is_reached[row] = 1
            row += 1
        if row < end:
            is_reached[row] = 1
        num_accepted.append(row - start)
    return num_accepted, is_reached


def check(tokens: list[int], drafts: list[int], lengths: list[int], device: torch.device) -> None:
    starts = [0, *np.cumsum(lengths).tolist()]
    arguments = [torch.tensor(own, dtype=torch.int32, device=device) for own in (tokens, drafts, starts)]
    for found in (verify(*arguments), verify_reference(*arguments)):
        assert found.num_accepted.dtype == found.is_reached.dtype == torch.int32
        own = (found.num_accepted.tolist(), found.is_reached.tolist())
        assert own == truth(tokens, drafts, starts)


def random_step(lengths: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(tokens, drafts); a draft equals its token with probability `share`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128256, sum(lengths))
    drafts = np.where(rng.random(len(tokens)) < share, tokens, rng.integers(0, 128256, len(tokens)))
    drafts[np.cumsum(lengths)[np.array(lengths) > 0] - 1] = -1
    return tokens.tolist(), drafts.tolist()


@pytest.mark.parametrize(
    "lengths",
    [[1], [5], [1, 6, 1, 3, 0, 2, 8, 8], [0], [300, 2, 128, 129], [1024]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_a_choice_counts_behind_accepted_drafts(lengths, kernel_device):
    for seed, share in enumerate((0.0, 0.7, 0.995, 1.0)):
        check(*random_step(lengths, share, seed), lengths, kernel_device)


def test_what_was_not_chosen_accepts_nothing(kernel_device):
    """A row where nothing could be chosen is -1, as is the draft of a last row. And a branch whose last row has a draft
    after all is accepted whole."""
    check([7, -1, 5, -1, 4, 4], [7, -1, 5, 5, 4, 4], [3, 1, 2], kernel_device)
    check([7, 8, -1, 9], [7, 8, -1, -1], [3, 1], kernel_device)


def test_of_no_branches(kernel_device):
    none = torch.zeros(0, dtype=torch.int32, device=kernel_device)
    found = verify(none, none, torch.zeros(1, dtype=torch.int32, device=kernel_device))
    assert found.num_accepted.shape == found.is_reached.shape == (0,)


def test_all_is_written_and_nothing_else_is_read(kernel_device, triton_interpreter, monkeypatch):
    def poisoned_like(like: Tensor) -> Tensor:
        return triton_interpreter.poisoned(*like.shape, dtype=like.dtype, device=like.device)

    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    lengths = [3, 130]
    tokens, drafts = random_step(lengths, 0.99, 4)
    numbers = torch.tensor([9, *tokens, 9, 9, *drafts, 9], dtype=torch.int32, device=kernel_device)
    own_tokens, own_drafts = numbers[1:134], numbers[136:269]
    assert own_drafts.tolist() == drafts
    starts = torch.tensor([0, 3, 133], dtype=torch.int32, device=kernel_device)
    found = verify(own_tokens, own_drafts, starts)
    own = (found.num_accepted.tolist(), found.is_reached.tolist())
    assert own == truth(tokens, drafts, [0, 3, 133])


def test_the_text_is_what_would_have_been_drawn_without_drafts(kernel_device):
    """A chain over 6 tokens with three drafts a step, against the same chain a token at a time."""
    size, length = 6, 40
    log_probs = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def chosen(before: int, position: int) -> int:
        row = [torch.tensor([number]) for number in (11, 0, position)]
        return int((log_probs[before] + gumbel(all_words(*row, size))[0]).argmax())

    one_by_one = [0]
    for position in range(length):
        one_by_one.append(chosen(one_by_one[-1], position))
    text, accepted = [0], 0
    while len(text) <= length:
        drafts = [int(log_probs[text[-1]].argmax()), 3, 1]
        behind = [text[-1], *drafts]
        tokens = [chosen(before, len(text) - 1 + row) for row, before in enumerate(behind)]
        arguments = (tokens, [*drafts, -1], [0, 4])
        found = verify(*(torch.tensor(own, dtype=torch.int32, device=kernel_device) for own in arguments))
        text += [token for token, counts in zip(tokens, found.is_reached.tolist(), strict=True) if counts]
        accepted += int(found.num_accepted)
    assert text[: length + 1] == one_by_one
    assert accepted > 5


def test_the_bytes_that_must_move():
    assert verification.verify_bytes(10, 3) == 4 * (10 * 3 + 3 + 4)
