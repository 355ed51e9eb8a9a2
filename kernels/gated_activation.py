"""The gate of a gated feed-forward layer (Shazeer 2020, "GLU variants improve transformer"), one launch.

    out = act(gate) · up        silu(g) = g · σ(g)
                                gelu_tanh(g) = g/2 · (1 + tanh(u)) = g · σ(2u),  u = √(2/π) · (g + 0.044715 g³)

where σ(z) = 1 / (1 + exp(-z)). Both activations are a product with one sigmoid: that identity lets a kernel do without
a tanh of its own. The kernel computes in float32 and rounds once; in 16 bit, torch rounds the activation before the
product, too, so that the last place or two may differ.

gate and up may be halves of one merged product: their rows may lie at any distance. Knows nothing of layers or of the
products around it. Imports Triton, which only Linux has: import it where there is a GPU.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]

BLOCK = 1024
"""Elements per program: 16 bytes per thread and operand in 16 bit."""

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up, contiguous [T, n]; gate and up [T, n] of one dtype, rows at any distance."""
    assert gate.shape == up.shape
    assert gate.ndim == 2
    assert gate.dtype == up.dtype
    assert activation in get_args(Activation)
    num_rows, width = gate.shape
    out = torch.empty(num_rows, width, dtype=gate.dtype, device=gate.device)
    if out.numel():
        assert width == 1 or gate.stride(1) == up.stride(1) == 1
        _gated_activation_kernel[(num_rows, -(-width // BLOCK))](
            *(gate, gate.stride(0), up, up.stride(0), out),
            *(width, activation == "silu", BLOCK, _SQRT_2_OVER_PI, _CUBIC),
            **OPTIONS,
        )
    return out


def gated_activation_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`gated_activation` in plain torch, in float32 or the wider dtype of its arguments, rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide)
    z = g if activation == "silu" else 2 * _SQRT_2_OVER_PI * (g + _CUBIC * g**3)
    return (g * torch.sigmoid(z) * up.to(wide)).to(gate.dtype)


def gated_activation_bytes(num_rows: int, width: int, dtype: torch.dtype) -> int:
    """What memory must move: two operands in, one out."""
    return 3 * num_rows * width * dtype.itemsize


@triton.jit  # type: ignore[untyped-decorator]
def _gated_activation_kernel(  # type: ignore[no-untyped-def]
    gate, gate_stride, up, up_stride, out,
    WIDTH: tl.constexpr, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK
    is_inside = column < WIDTH
    g = tl.load(gate + row * gate_stride + column, mask=is_inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=is_inside, other=0.0).to(tl.float32)
    if IS_SILU:
        z = g
    else:
        z = 2 * SCALE * (g + CUBIC * g * g * g)
    result = g / (1.0 + tl.exp(-z)) * u
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=is_inside)
