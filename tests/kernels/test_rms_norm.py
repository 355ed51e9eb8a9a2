"""The norm, with and without a residual, against float64: in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import rms_norm as kernels

UNITS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""The relative error of one rounding; bfloat16's is that of the interpreter, which truncates."""

EPS = 1e-3


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def truth_of(x: Tensor, weight: Tensor | None, offset: float = 0.0) -> Tensor:
    """In words of the definition, one row after another, float64."""
    rows = []
    for row in x.double().cpu().reshape(-1, x.shape[-1]):
        normed = row / ((row @ row) / len(row) + EPS).sqrt()
        rows.append(normed if weight is None else normed * (weight.double().cpu() + offset))
    return torch.stack(rows).view(x.shape)


def assert_close(result: Tensor, truth: Tensor, num_roundings: int = 1) -> None:
    assert result.shape == truth.shape
    assert result.is_contiguous()
    allowed = (num_roundings * UNITS[result.dtype] * 1.01 + 2e-6) * truth.abs() + 1e-7
    assert ((result.cpu().double() - truth).abs() <= allowed).all()


CASES = {
    "one element": (1, 1),
    "one row": (1, 100),
    "a power of two": (3, 2048),
    "heads, several per program, the last program ragged": (11, 64),
    "ragged": (5, 1500),
    "longer than registers": (2, kernels.MAX_BLOCK + 1000),
}


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("rounds_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_norm_equals_float64(name, rounds_first, dtype, kernel_device):
    num_rows, width = CASES[name]
    x = random(num_rows, width, dtype=dtype, device=kernel_device)
    weight = random(width, dtype=dtype, device=kernel_device, seed=1)
    offset = 0.0 if rounds_first else 1.0
    truth = truth_of(x, weight, offset)
    arguments = {"eps": EPS, "offset": offset, "rounds_first": rounds_first}
    assert_close(kernels.rms_norm(x, weight, **arguments), truth, 2 if rounds_first else 1)
    assert_close(kernels.rms_norm_reference(x, weight, **arguments), truth, 2 if rounds_first else 1)
    reference = kernels.rms_norm_reference(x.double(), weight.double(), **arguments)
    assert torch.allclose(reference.cpu(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_torchs_and_the_norm_is_of_the_rounded_sum(name, dtype, kernel_device):
    num_rows, width = CASES[name]
    x, residual = (random(num_rows, width, dtype=dtype, device=kernel_device, seed=seed) for seed in (2, 3))
    weight = random(width, dtype=torch.float32, device=kernel_device, seed=4)
    total, normed = kernels.add_rms_norm(x, residual, weight, EPS, offset=1.0, rounds_first=False)
    assert_close(total, x.double().cpu() + residual.double().cpu())
    if not (dtype == torch.bfloat16 and kernel_device.type == "cpu"):
        assert torch.equal(total, x + residual)
    assert_close(normed, truth_of(total, weight, 1.0))
    total, normed = kernels.add_rms_norm_reference(x, residual, weight, EPS, offset=1.0, rounds_first=False)
    assert torch.equal(total, x + residual)
    assert_close(normed, truth_of(total, weight, 1.0))


def test_rounding_the_sum_first_shows(kernel_device):
    """1 + 2^-13 is 1 in half precision; were it not rounded, the row's mean square would be another."""
    x = torch.full((1, 64), 2048.0, dtype=torch.float16, device=kernel_device)
    residual = torch.full_like(x, 0.75)
    total, normed = kernels.add_rms_norm(x, residual, None, 0.0, rounds_first=False)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, torch.ones_like(x))


def test_when_the_norm_is_rounded_shows(kernel_device):
    """Half precision, a weight that brings the norm's rounding to light."""
    x = random(4, 256, dtype=torch.float16, device=kernel_device)
    weight = random(256, dtype=torch.float16, device=kernel_device, seed=1)
    by_family = [
        kernels.rms_norm(x, weight, EPS, rounds_first=rounds_first) for rounds_first in (True, False)
    ]
    assert not torch.equal(*by_family)
    for result, rounds_first in zip(by_family, (True, False), strict=True):
        reference = kernels.rms_norm_reference(x, weight, EPS, rounds_first=rounds_first)
        assert (result != reference).float().mean() < 0.01  # where float32's last place decides


@pytest.mark.parametrize("rounds_first", [True, False])
def test_without_a_weight(rounds_first, kernel_device):
    x = random(3, 100, dtype=torch.float32, device=kernel_device)
    assert_close(kernels.rms_norm(x, None, EPS, rounds_first=rounds_first), truth_of(x, None))


def views(device: torch.device, poisoned: Tensor) -> dict[str, Tensor]:
    """Rows with other data around them, all of shape [.., 32]; poisoned: [4, 6, 40] of NaN."""
    values = random(4, 6, 32, dtype=torch.float32, device=device, seed=9)
    poisoned[..., 3:35] = values
    whole = poisoned[..., 3:35]
    skipped = torch.full((8, 6, 32), torch.nan, device=device)
    skipped[::2] = values
    return {
        "heads of a merged product": whole[None],
        "every other row": whole[:, 2],
        "heads before tokens": whole.transpose(0, 1),
        "distances of three kinds": skipped[::2].view(4, 2, 3, 32).transpose(1, 2),
        "an expanded row": whole[:1, 0].expand(5, 32),
        "backwards elements": values.flip(0).transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize(
    "name",
    [
        "heads of a merged product",
        "every other row",
        "heads before tokens",
        "distances of three kinds",
        "an expanded row",
        "backwards elements",
    ],
)
def test_rows_may_lie_anywhere(name, triton_interpreter, kernel_device):
    x = views(kernel_device, triton_interpreter.poisoned(4, 6, 40, device=str(kernel_device)))[name]
    weight = random(32, dtype=torch.float32, device=kernel_device)
    assert_close(kernels.rms_norm(x, weight, EPS, rounds_first=True), truth_of(x, weight))
    other = torch.ones_like(x).contiguous()
    total, normed = kernels.add_rms_norm(other, x, weight, EPS, rounds_first=True)
    assert torch.equal(total, x + 1)
    assert_close(normed, truth_of(x + 1, weight))


@pytest.mark.parametrize("width", [64, 300])
def test_a_row_is_the_same_bits_in_any_company(width, kernel_device):
    x, residual = (
        random(20, width, dtype=torch.bfloat16, device=kernel_device, seed=seed) for seed in (5, 6)
    )
    weight = random(width, dtype=torch.bfloat16, device=kernel_device, seed=7)
    together = kernels.add_rms_norm(x, residual, weight, EPS, rounds_first=True)
    for kept in ([0], [19], [3, 17], [18, 2, 1, 9, 4]):
        part = kernels.add_rms_norm(x[kept], residual[kept], weight, EPS, rounds_first=True)
        assert all(torch.equal(one, whole[kept]) for one, whole in zip(part, together, strict=True))
    alone = kernels.rms_norm(together[0][7], weight, EPS, rounds_first=True)
    assert torch.equal(alone, together[1][7])


@pytest.mark.parametrize("shape", [(0, 8), (1, 0, 4, 8)])
def test_no_rows_give_no_rows(shape, kernel_device):
    empty = torch.empty(shape, device=kernel_device)
    weight = torch.ones(8, device=kernel_device)
    assert kernels.rms_norm(empty, weight, EPS, rounds_first=True).shape == shape
    total, normed = kernels.add_rms_norm(empty, empty, weight, EPS, rounds_first=True)
    assert total.shape == normed.shape == shape


def test_the_bytes_that_must_move():
    assert kernels.rms_norm_bytes(7, 100, torch.bfloat16) == (2 * 7 * 100 + 100) * 2
    assert kernels.rms_norm_bytes(7, 100, torch.float32, has_residual=True) == (4 * 7 * 100 + 100) * 4
