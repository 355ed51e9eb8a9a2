"""Best tokens and their log-probabilities against float64, interpreted and, where there is one, on a GPU."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import top_tokens as module
from cadenza.kernels.fused_sampling import NOT_NUMBERS, NOTHING_ALLOWED, OK
from cadenza.kernels.top_tokens import TopRows, TopTokens, top_tokens


def rows_of(rows: list[tuple[int, int, int, int, int]], device: torch.device | str) -> TopRows:
    """(logits_row, mask_row, num_tokens, num_columns, is_normalized) each."""
    table = torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 5)
    return TopRows(*(column.contiguous() for column in table.unbind(1)))


def bitmask_of(allowed: np.ndarray, num_words: int) -> Tensor:
    """allowed: [M, at most 32 * num_words] bool."""
    bits = np.zeros((len(allowed), num_words * 32), bool)
    bits[:, : allowed.shape[1]] = allowed
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32).copy())


def truth(
    logits: Tensor, allowed: np.ndarray, rows: TopRows, width: int
) -> list[tuple[int, list[int], list[float]]]:
    """(status, tokens, scores) of each row, token by token in float64; allowed: [M, any] bool."""
    found = []
    for number, mask, num_tokens, num_columns, is_normalized in zip(
        *(getattr(rows, field.name).tolist() for field in fields(rows)), strict=True
    ):
        own = logits[number].double().cpu().numpy()
        in_reach = range(min(num_tokens, len(own)))
        may = [token for token in in_reach if mask < 0 or (token < allowed.shape[1] and allowed[mask, token])]
        over = may if is_normalized else range(min(num_columns, len(own)))
        counted = own[list(over)]
        if np.isnan(counted).any() or np.isposinf(counted).any():
            found.append((NOT_NUMBERS, [], []))
            continue
        total = np.logaddexp.reduce(counted) if len(counted) else -math.inf
        own_best = sorted((-own[token], token) for token in set(may) & set(over) if own[token] > -math.inf)
        best = own_best[:width]
        tokens, scores = [token for _, token in best], [-value - total for value, _ in best]
        found.append((OK if best else NOTHING_ALLOWED, tokens, scores))
    return found


def check(result: TopTokens, expected: list[tuple[int, list[int], list[float]]], width: int) -> None:
    assert result.scores.shape == result.tokens.shape == (len(expected), width)
    assert result.tokens.dtype == result.status.dtype == torch.int32
    for number, (status, tokens, scores) in enumerate(expected):
        missing = width - len(tokens)
        assert int(result.status[number]) == status
        assert result.tokens[number].tolist() == tokens + [-1] * missing
        own = result.scores[number].double().cpu().numpy()
        np.testing.assert_allclose(own, scores + [-math.inf] * missing, rtol=1e-6, atol=3e-6)


def random_logits(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """With ties, but for float32, and signed zeros."""
    generator = torch.Generator().manual_seed(num_columns)
    values = torch.randn(num_rows, num_columns, generator=generator) * 4
    values[:, ::7] = values[:, ::7].round()
    return values.to(dtype)


CASES = {
    "beam": (5000, torch.bfloat16, 8, 0, 8, range(7)),
    "alternatives, odd size and stride": (4099, torch.float16, 20, 3, 2, [1, 2]),
    "the widest": (8192 + 33, torch.float32, 64, 0, 31, [3]),
    "one of few": (33, torch.float32, 1, 1, 0, [0, 2, 6]),
    "more than there are": (7, torch.bfloat16, 10, 0, 9, [0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_best_tokens_equal_float64(name, kernel_device):
    """Masks that end before and after the vocabulary, padded vocabularies, rows that share logits; NaN everywhere that
    no row counts."""
    num_columns, dtype, width, before, after, kept = CASES[name]
    logits = random_logits(4, num_columns, dtype)
    rng = np.random.default_rng(width)
    num_words = max(1, num_columns // 32 - 1)
    allowed = rng.random((3, num_words * 32)) < np.array([[0.5], [0.02], [0.0]])
    shorter = num_columns - num_columns // 5
    rows = [
        (2, -1, num_columns, num_columns, 0),
        (0, 0, num_columns, num_columns, 0),
        (0, 0, shorter, num_columns, 1),
        (3, 1, num_columns, shorter, 0),
        (3, -1, shorter, shorter, 0),
        (0, 2, num_columns, num_columns, 1),
        (0, 2, num_columns, num_columns, 0),
    ]
    rows = [rows[number] for number in kept]
    asked = rows_of(rows, "cpu")
    expected = truth(logits, allowed, asked, width)
    logits[1] = torch.nan
    logits[3, shorter:] = torch.nan
    wide = torch.full((4, before + num_columns + after), torch.nan, dtype=dtype)
    wide[:, before : before + num_columns] = logits
    view = wide.to(kernel_device)[:, before : before + num_columns]
    bitmask = bitmask_of(allowed, num_words).to(kernel_device)
    on_device = rows_of(rows, kernel_device)
    check(top_tokens(view, bitmask, on_device, width), expected, width)
    check(module.top_tokens_reference(view, bitmask, on_device, width), expected, width)
    exact = module.top_tokens_reference(view.double(), bitmask, on_device, width)
    check(exact, expected, width)
    assert exact.scores.dtype == torch.float64


def test_equal_logits_go_to_the_lowest_ids(kernel_device):
    """Of several groups and blocks, and of both zeros."""
    logits = torch.full((3, 9000), -3.0)
    logits[0, [8999, 70, 4096, 4095, 63, 64, 8000]] = 1.5
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2, 5000:5003] = torch.tensor([-0.0, 0.0, -0.0])
    rows = rows_of([(row, -1, 9000, 9000, 0) for row in range(3)], kernel_device)
    found = top_tokens(logits.to(kernel_device), None, rows, 8).tokens
    assert found[0].tolist() == [63, 64, 70, 4095, 4096, 8000, 8999, 0]
    assert found[1].tolist() == list(range(8))
    assert found[2].tolist() == [5000, 5001, 5002, 0, 1, 2, 3, 4]


def test_all_of_the_best_in_one_group_and_each_in_its_own(kernel_device):
    logits = torch.linspace(-1, 0, 8192)[None].repeat(2, 1)
    logits[0, 4096 + 128 : 4096 + 192] = torch.linspace(5, 9, 64)
    logits[1, 64::1024] = torch.linspace(9, 5, 8)
    rows = rows_of([(0, -1, 8192, 8192, 0), (1, -1, 8192, 8192, 0)], kernel_device)
    found = top_tokens(logits.to(kernel_device), None, rows, 8).tokens
    assert found[0].tolist() == list(range(4096 + 191, 4096 + 183, -1))
    assert found[1].tolist() == list(range(64, 8192, 1024))


def test_what_is_no_number_counts_where_it_is_counted(kernel_device):
    """Token 5 of 40 is NaN or +inf, or everything is -inf."""
    logits = torch.zeros(3, 40)
    logits[0, 5], logits[1, 5], logits[2] = torch.nan, torch.inf, -torch.inf
    without = np.ones((1, 40), bool)
    without[0, 5] = False
    rows = [
        *((row, -1, 40, 40, 0) for row in range(3)),
        *((row, 0, 40, 40, 1) for row in range(3)),
        *((row, 0, 40, 40, 0) for row in range(3)),
        (0, -1, 5, 5, 0),
        (1, -1, 5, 40, 1),
        (0, -1, 5, 40, 0),
        (0, -1, 0, 40, 1),
    ]
    asked = rows_of(rows, kernel_device)
    arguments = (logits.to(kernel_device), bitmask_of(without, 2).to(kernel_device), asked, 4)
    for found in (top_tokens(*arguments), module.top_tokens_reference(*arguments)):
        assert found.status.tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 2, 1]
        check(found, truth(logits, without, rows_of(rows, "cpu"), 4), 4)


def test_a_large_vocabulary_is_picked_from_in_several_goes(kernel_device, monkeypatch):
    monkeypatch.setattr(module, "MOST_GROUPS", 64)
    logits = random_logits(1, 3 * 4096 - 5, torch.bfloat16)
    rows = rows_of([(0, -1, 3 * 4096, 3 * 4096, 0)], kernel_device)
    expected = truth(logits, np.zeros((0, 0), bool), rows, 20)
    check(top_tokens(logits.to(kernel_device), None, rows, 20), expected, 20)


@pytest.mark.parametrize(("num_columns", "width", "is_normalized"), [(128256, 20, 0), (49152, 8, 1)])
def test_the_vocabularies_we_serve(num_columns, width, is_normalized, kernel_device):
    logits = random_logits(1, num_columns, torch.bfloat16)
    allowed = np.random.default_rng(0).random((1, num_columns)) < 0.3
    rows = [(0, 0, num_columns - 256, num_columns, is_normalized)]
    expected = truth(logits, allowed, rows_of(rows, "cpu"), width)
    bitmask = bitmask_of(allowed, num_columns // 32).to(kernel_device)
    check(top_tokens(logits.to(kernel_device), bitmask, rows_of(rows, kernel_device), width), expected, width)


def test_a_row_is_the_same_bits_in_any_company(kernel_device):
    logits = random_logits(4, 4500, torch.float32).to(kernel_device)
    rows = [(row, -1, 4500 - row, 4500, row % 2) for row in range(4)]
    together = top_tokens(logits, None, rows_of(rows, kernel_device), 8)
    for kept in ([2], [3, 1, 0]):
        part = top_tokens(logits, None, rows_of([rows[row] for row in kept], kernel_device), 8)
        for field in fields(part):
            assert torch.equal(getattr(part, field.name), getattr(together, field.name)[kept])


def test_memory_may_hold_anything_before(kernel_device, triton_interpreter, monkeypatch):
    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return triton_interpreter.poisoned(*shape, dtype=dtype, device=device)

    logits = random_logits(1, 4100, torch.float32)
    rows = rows_of([(0, -1, 4100, 4100, 0)], kernel_device)
    expected = truth(logits, np.zeros((0, 0), bool), rows, 20)
    on_device = logits.to(kernel_device)
    monkeypatch.setattr(torch, "empty", poisoned)
    found = top_tokens(on_device, None, rows, 20)
    monkeypatch.undo()
    check(found, expected, 20)


def test_of_no_rows(kernel_device):
    found = top_tokens(torch.ones(2, 40, device=kernel_device), None, rows_of([], kernel_device), 3)
    assert found.scores.shape == found.tokens.shape == (0, 3)
    assert found.status.shape == (0,)


def test_the_bytes_that_must_move():
    counted = module.top_tokens_bytes(8, 1000, 3, 10, torch.bfloat16)
    assert counted == 8 * (2000 + 20 + 80 + 4) + 3 * 32 * 4
