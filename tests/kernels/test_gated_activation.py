"""The gated activation against float64, in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import gated_activation as kernels

ERRORS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""Relative, of a result that is rounded once; bfloat16's is that of the interpreter, which truncates."""

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4
    return values.to(dtype).to(device)


def assert_close(result: Tensor, truth: Tensor) -> None:
    assert result.shape == truth.shape
    allowed = ERRORS[result.dtype] * 1.01 * truth.abs() + 2e-6
    assert ((result.cpu().double() - truth.cpu()).abs() <= allowed).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 1024), (5, 2500), (2, 17)])
def test_it_equals_float64(activation, dtype, num_rows, width, kernel_device):
    gate, up = (random(num_rows, width, dtype=dtype, device=kernel_device, seed=seed) for seed in (1, 2))
    truth = ACTIVATIONS[activation](gate.double()) * up.double()
    assert_close(kernels.gated_activation(gate, up, activation), truth)
    reference = kernels.gated_activation_reference(gate.double(), up.double(), activation)
    assert torch.allclose(reference, truth, rtol=1e-9, atol=1e-12)
    assert_close(kernels.gated_activation_reference(gate, up, activation), truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_it_neither_overflows_nor_loses_the_tail(activation, kernel_device):
    gate = torch.tensor(
        [[-1e4, -200.0, -90.0, -20.0, -5.0, -1e-6, 0.0, 1e-6, 90.0, 1e4]], device=kernel_device
    )
    up = torch.full_like(gate, 3.0)
    truth = kernels.gated_activation_reference(gate.double(), up.double(), activation)
    result = kernels.gated_activation(gate, up, activation).double()
    assert torch.allclose(result, truth, rtol=1e-5, atol=1e-35)


def test_halves_of_a_merged_product(triton_interpreter, kernel_device):
    """NaN around the rows, none of which is read."""
    whole = triton_interpreter.poisoned(4, 2 * 100 + 24, device=str(kernel_device))
    whole[:, 8:208] = random(4, 200, dtype=torch.float32, device=kernel_device)
    gate, up = whole[:, 8:108], whole[:, 108:208]
    result = kernels.gated_activation(gate, up, "silu")
    assert result.is_contiguous()
    assert_close(result, F.silu(gate.double()) * up.double())


def test_a_row_is_the_same_bits_in_any_company(kernel_device):
    gate, up = (random(6, 300, dtype=torch.bfloat16, device=kernel_device, seed=seed) for seed in (3, 4))
    together = kernels.gated_activation(gate, up, "gelu_tanh")
    for kept in ([4], [0, 5], [5, 1, 2]):
        assert torch.equal(kernels.gated_activation(gate[kept], up[kept], "gelu_tanh"), together[kept])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_gives_nothing(shape, kernel_device):
    empty = torch.empty(shape, device=kernel_device)
    assert kernels.gated_activation(empty, empty, "silu").shape == shape


def test_the_bytes_that_must_move():
    assert kernels.gated_activation_bytes(7, 100, torch.bfloat16) == 3 * 7 * 100 * 2
