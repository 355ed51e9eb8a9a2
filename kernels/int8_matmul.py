"""A few rows times a weight of 8-bit integers, on GPUs, in Triton: each is read once and made a float in registers.

    y[m, n] = (Σ_k x[m, k] * w[n, k]) * scale[n] + bias[n],     w int8

as in gpt-fast's weight-only int8 (PyTorch's "int8 weight-only"), whose products torch.compile makes. An 8-bit integer
is exact in bfloat16 and in float16, so that nothing is rounded before tensor cores sum in float32.

With so few rows the time is what reading the weight takes. A program computes 16 or 32 rows times 128 outputs over a
piece of the inputs (`few_rows`). Both heights use the same tensor-core instruction, 16 rows high, and sum inputs in the
same order: a row's bits do not depend on how many rows there are, provided that the hardware treats the 16 rows of a
product alike. More than 32 rows are several programs that read the same weight, the second time from the cache. Beyond
`MOST_ROWS` a matrix product that reuses what it reads is the better one.

Knows nothing of modules, of how the integers are chosen or of rotations. Everything is on the current device. Imports
Triton, which only Linux has: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.few_rows import dot, split, sum_splits
from cadenza.kernels.ops import is_interpreted

OUTPUTS = 128
"""Per program; must not depend on the number of rows."""
_STEPS = {2: 128, 4: 64}
"""Inputs at a time, by bytes per element of x; they decide the order of summation."""
_OPTIONS = {
    2: {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True},
    4: {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
}
"""By bytes per element of x. Chosen by arithmetic and by what compiles without spilling; not measured on a GPU."""


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[r, n] in x's dtype: x [r, k] float32, bfloat16 or float16, rows at any distance; weight [n, k] int8, too.

    scale: [n] float32; bias: [n] floating-point or None.
    """
    (num_rows, width), outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == width
    assert weight.dtype == torch.int8
    assert x.stride(1) == 1 or width == 1
    assert weight.stride(1) == 1 or width == 1
    assert scale.shape == (outputs,)
    assert scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert bias is None or (bias.shape == (outputs,) and bias.is_contiguous())
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    step = _STEPS[x.dtype.itemsize]
    num_blocks = -(-outputs // OUTPUTS)
    num_splits, per_split = split(num_blocks, -(-width // step))
    is_whole = num_splits == 1
    sums = out
    if not is_whole:
        sums = torch.empty(num_splits, num_rows, outputs, dtype=torch.float32, device=x.device)
    tile = 16 if num_rows <= 16 else 32
    _int8_matmul_kernel[(-(-num_rows // tile), num_blocks, num_splits)](
        *(x, x.stride(0), weight, weight.stride(0), scale, bias if is_whole else None, sums),
        *(num_rows, outputs, width, per_split),
        *(tile, OUTPUTS, step, is_interpreted(x)),
        **_OPTIONS[x.dtype.itemsize],
    )
    if not is_whole:
        sum_splits(sums, bias, out)
    return out


def int8_matmul_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_matmul` in plain torch, in the dtype of x (float64 for a truth)."""
    y = (x @ weight.to(x.dtype).T) * scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def int8_matmul_bytes(num_rows: int, outputs: int, width: int, dtype: torch.dtype) -> int:
    """What memory must move: the weight and its scales, the rows and the result once each."""
    return outputs * (width + 4) + num_rows * (outputs + width) * dtype.itemsize


@triton.jit(do_not_specialize=["num_rows", "per_split"])  # type: ignore[untyped-decorator]
def _int8_matmul_kernel(  # type: ignore[no-untyped-def]
    x, x_stride, weight, weight_stride, scale, bias, out, num_rows, outputs, width, per_split,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of outputs, piece of the inputs); out is [pieces, num_rows, outputs]."""
    row = tl.arange(0, ROWS) + tl.program_id(0) * ROWS
    output = tl.arange(0, OUTPUTS) + tl.program_id(1) * OUTPUTS
    piece = tl.program_id(2)
    is_row = row < num_rows
    is_output = output < outputs
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    weight_row = weight + output.to(tl.int64)[None, :] * weight_stride
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    first = piece * per_split
    for step in range(first, tl.minimum(first + per_split, tl.cdiv(width, STEP))):
        k = tl.arange(0, STEP) + step * STEP
        is_inside = k < width
        w = tl.load(weight_row + k[:, None], mask=is_output[None, :] & is_inside[:, None], other=0)
        rows = tl.load(x_row + k[None, :], mask=is_row[:, None] & is_inside[None, :], other=0.0)
        total = dot(rows, w, total, INTERPRETED)
    total *= tl.load(scale + output, mask=is_output, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    at = out + (row + num_rows.to(tl.int64) * piece)[:, None] * outputs + output[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])
