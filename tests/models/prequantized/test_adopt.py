"""Integers that a method of ours can hold are kept, not rounded again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.models.prequantized.adopt import _taken_over
from cadenza.models.prequantized.lattice import Lattice
from cadenza.models.quantization.int4 import Int4, layout_for
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.llm_int8 import LLMInt8


def _lattice(group_size: int, low: int, high: int, *, has_zeros: bool = True) -> Lattice:
    """[96, 256]: few of the levels between low and high are used in each group, as in real checkpoints."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(low, high + 1, (96, 256), generator=generator)
    values = values.clamp(low + 3, high - 4)
    values[0, 0], values[0, 1] = low, high
    scales = torch.rand(96, 256 // group_size, generator=generator) * 0.01 + 0.001
    zeros = torch.randint(low, high + 1, scales.shape, generator=generator) if has_zeros else None
    return Lattice(values.to(torch.int8), scales.half().float(), zeros)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("low", "high"), [(0, 15), (-8, 7)])
def test_int4_keeps_the_integers(low: int, high: int, group_size: int) -> None:
    lattice, method = _lattice(128, low, high), Int4(group_size, layout_for(torch.device("cpu")))
    tensors = _taken_over(lattice, method)
    assert tensors is not None
    assert _error(method, tensors, lattice) < 3e-3  # scales and zeros are bfloat16
    assert _error(method, method.quantize(lattice.dequantized()), lattice) > 1e-2


def _error(method: Any, tensors: Any, lattice: Lattice) -> float:
    layer = method.layer(256, 96, has_bias=False, dtype=torch.float32)
    for name, tensor in tensors.items():
        empty = getattr(layer, name)
        assert (empty.shape, empty.dtype) == (tensor.shape, tensor.dtype)
        setattr(layer, name, tensor)
    expected = lattice.dequantized()
    return float((layer.dequantized() - expected).norm() / expected.norm())


def test_llm_int8_keeps_the_integers() -> None:
    """Also where no row reaches 127, and where -128 occurs."""
    lattice = _lattice(256, -128, 100, has_zeros=False)
    tensors = _taken_over(lattice, LLMInt8())
    assert tensors is not None
    assert torch.equal(tensors["qweight"], lattice.values)
    assert torch.equal(tensors["scale"], lattice.scales[:, 0])
    layer: Any = LLMInt8().layer(256, 96, has_bias=False, dtype=torch.float32)
    layer.qweight, layer.scale = tensors["qweight"], tensors["scale"]
    x = torch.randint(-127, 128, (3, 256), generator=torch.Generator().manual_seed(1)).float() / 32
    x[:, 0] = 127 / 32
    layer.prepare()
    expected = x.double() @ lattice.dequantized().double().T
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lattice", "method"),
    [
        (_lattice(32, 0, 15), Int4(64, layout_for(torch.device("cpu")))),
        (_lattice(128, 0, 31), Int4(32, layout_for(torch.device("cpu")))),
        (_lattice(128, -128, 127, has_zeros=False), LLMInt8()),
        (_lattice(256, -128, 127), LLMInt8()),
        (_lattice(256, -128, 127, has_zeros=False), Int8()),
    ],
)
def test_what_does_not_fit_is_left_to_rounding(lattice: Lattice, method: Any) -> None:
    assert _taken_over(lattice, method) is None


def test_groups_in_another_order_are_left_to_rounding() -> None:
    plain = _lattice(128, 0, 15)
    order: Tensor = torch.arange(256) % 2
    lattice = Lattice(plain.values, plain.scales, plain.zeros, order)
    assert _taken_over(lattice, Int4(32, layout_for(torch.device("cpu")))) is None
