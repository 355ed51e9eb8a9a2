"""Rotated blocks against float64, in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
from scipy.linalg import hadamard as scipys_hadamard

pytest.importorskip("triton")

from cadenza.kernels import hadamard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "size"), [((1, 64), 64), ((2, 3, 704), 64), ((5, 96), 32), ((37, 48), 16)])
def test_blocks_equal_float64(shape, size, dtype, kernel_device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(size)).to(dtype)
    matrix = torch.from_numpy(scipys_hadamard(size)).double()
    expected = (x.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2) / 8
    magnitude = x.double().abs().unflatten(-1, (-1, size)).sum(-1, keepdim=True).expand(*shape[:-1], -1, size)
    found = hadamard.rotate_blocks(x.to(kernel_device), size, 1 / 8)
    assert found.shape == x.shape
    assert found.dtype == dtype
    # the interpreter cuts off where a GPU rounds to bfloat16
    unit = torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and kernel_device.type == "cpu" else 0.5)
    allowed = unit * expected.abs() + 2.0**-24 * magnitude.flatten(-2)
    assert ((found.double().cpu() - expected).abs() <= allowed).all()
    assert torch.equal(hadamard.rotate_blocks_reference(x.double(), size, 1 / 8), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_alone_and_in_any_company(
    dtype, kernel_device, triton_interpreter, monkeypatch
):
    """One of them is broken; results lie in memory full of NaN."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).to(dtype).to(kernel_device)
    together = hadamard.rotate_blocks(x, 64, 1.0)
    x[7] = torch.nan
    monkeypatch.setattr(
        torch,
        "empty",
        lambda shape, dtype, device: triton_interpreter.poisoned(*shape, dtype=dtype, device=str(device)),
    )
    broken = hadamard.rotate_blocks(x, 64, 1.0)
    assert broken[7].isnan().all()
    assert torch.equal(broken[8:], together[8:])
    for rows in (slice(0, 1), slice(39, 40), slice(9, 27)):
        assert torch.equal(hadamard.rotate_blocks(x[rows], 64, 1.0), together[rows])


def test_no_rows(kernel_device):
    assert hadamard.rotate_blocks(torch.empty(2, 0, 64, device=kernel_device), 64, 1.0).shape == (2, 0, 64)


def test_the_bytes_that_must_move():
    assert hadamard.rotate_blocks_bytes(torch.empty(3, 64, dtype=torch.bfloat16)) == 2 * 3 * 64 * 2
