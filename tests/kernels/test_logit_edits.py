"""Edited copies of rows against float64 and, bit for bit, float32, in Triton's interpreter and on a GPU."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import logit_edits
from cadenza.kernels.logit_edits import Edits, edited_rows, edited_rows_reference


def edits_of(rows: list[tuple[int, int, float, float]], device: torch.device | str) -> Edits:
    """(row, token, repetition, offset) each."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    dtypes = (torch.int32, torch.int32, torch.float32, torch.float32)
    return Edits(
        *(torch.tensor(own, dtype=kind, device=device) for own, kind in zip(columns, dtypes, strict=True))
    )


def random_edits(
    num_rows: int, num_columns: int, per_row: int, seed: int
) -> list[tuple[int, int, float, float]]:
    """Of every row but the last, which is copied only; a ban among ten."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(num_rows - 1):
        for token in rng.permutation(num_columns)[:per_row].tolist():
            offset = -math.inf if rng.random() < 0.1 else float(rng.normal()) * (rng.random() < 0.7)
            found.append((row, token, float(rng.uniform(0.5, 2.0)) if rng.random() < 0.7 else 1.0, offset))
    return found


def truth(logits: Tensor, logits_rows: list[int], edits: list[tuple[int, int, float, float]]) -> np.ndarray:
    """float64, edit by edit, in words of the definition."""
    result = logits.double().cpu().numpy()[logits_rows]
    for row, token, repetition, offset in edits:
        x, repetition = result[row, token], float(np.float32(repetition))
        x = x / repetition if x > 0 else x * repetition
        result[row, token] = -math.inf if offset == -math.inf else x + float(np.float32(offset))
    return result


def surrounded(logits: Tensor, before: int, after: int) -> Tensor:
    """A view of the same values with NaN before and after each row."""
    wide = torch.full((len(logits), before + logits.shape[1] + after), torch.nan, dtype=logits.dtype)
    wide = wide.to(logits.device)
    wide[:, before : before + logits.shape[1]] = logits
    return wide[:, before : before + logits.shape[1]]


CASES = {
    "padded stride": (5000, torch.bfloat16, 0, 8),
    "odd size and stride": (4097, torch.float16, 3, 2),
    "float32, whole blocks": (8192, torch.float32, 0, 0),
    "one column": (1, torch.float32, 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_copies_equal_float64_and_logits_stay_as_they_are(name, kernel_device):
    num_columns, dtype, before, after = CASES[name]
    generator = torch.Generator().manual_seed(num_columns)
    logits = (torch.randn(4, num_columns, generator=generator) * 5).to(dtype).to(kernel_device)
    logits[1] = torch.nan  # no row of those that are copied
    view = surrounded(logits, before, after)
    rows = [3, 0, 3, 2]
    edits = random_edits(len(rows), num_columns, 150, seed=1)
    logits_rows = torch.tensor(rows, dtype=torch.int32, device=kernel_device)
    result = edited_rows(view, logits_rows, edits_of(edits, kernel_device))
    assert result.shape == (4, num_columns)
    assert result.dtype == torch.float32
    assert result.stride(0) % 16 == 0
    expected = truth(logits, rows, edits)
    np.testing.assert_allclose(result.double().cpu().numpy(), expected, rtol=3e-7, atol=1e-6)
    assert torch.equal(result[3], logits[2].float())  # without edits, exact
    assert np.count_nonzero(expected[0] != expected[2]) > 0 or num_columns == 1
    assert torch.equal(view.nan_to_num(7.0), logits.nan_to_num(7.0))
    of_float64 = edited_rows_reference(view.double(), logits_rows, edits_of(edits, kernel_device))
    np.testing.assert_allclose(of_float64.cpu().numpy(), expected, rtol=1e-14)
    assert torch.equal(edited_rows_reference(view, logits_rows, edits_of(edits, kernel_device)), result)


def test_infinities_bans_and_what_is_no_number(kernel_device):
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 2.0, -2.0]
    logits = torch.tensor([values], device=kernel_device)
    zero = torch.zeros(3, dtype=torch.int32, device=kernel_device)
    edits = [
        *((0, token, 1.5, 0.5) for token in range(7)),
        *((1, token, 1.5, -math.inf) for token in range(7)),
        (2, 5, 1.0, 0.0),
    ]
    result = edited_rows(logits, zero, edits_of(edits, kernel_device))
    penalized = [math.inf, -math.inf, math.nan, 0.5, 0.5, 2.0 / 1.5 + 0.5, -2.5]
    assert torch.allclose(result[0].cpu(), torch.tensor(penalized), rtol=1e-7, equal_nan=True)
    assert (result[1] == -math.inf).all()
    assert torch.equal(result[2].nan_to_num(9.0), logits[0].nan_to_num(9.0))


def test_memory_may_hold_anything_before(kernel_device, triton_interpreter, monkeypatch):
    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return triton_interpreter.poisoned(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    logits = torch.linspace(-3, 3, 4100, device=kernel_device)[None]
    edits = edits_of([(0, 4099, 2.0, 1.0)], kernel_device)
    result = edited_rows(logits, torch.zeros(1, dtype=torch.int32, device=kernel_device), edits)
    expected = logits.clone()
    expected[0, 4099] = 2.5
    assert torch.equal(result, expected)
    padding = result.as_strided((1, 12), (1, 1), 4100)
    assert (padding == -math.inf).all()


def test_of_nothing(kernel_device):
    logits = torch.ones(2, 40, device=kernel_device)
    nothing = edits_of([], kernel_device)
    none = torch.zeros(0, dtype=torch.int32, device=kernel_device)
    assert edited_rows(logits, none, nothing).shape == (0, 40)
    copied = edited_rows(logits, none.new_tensor([1]), nothing)
    assert torch.equal(copied, logits[1:])


def test_the_bytes_that_must_move():
    assert logit_edits.edited_rows_bytes(3, 1000, 7, torch.bfloat16) == 3 * (1000 * 6 + 4) + 7 * 16
