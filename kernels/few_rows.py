"""What products of a few rows with quantized weights have in common on a GPU, in Triton: `int8_matmul`, `int4_matmul`.

*Pieces.* A weight with few outputs gives few programs, and a few rows of them cannot fill a GPU. So sums over the
inputs are cut in pieces ("split-K", as in CUTLASS and Marlin), each of them float32, which are added up in their order:

    out[r, n] = partial[0, r, n] + partial[1, r, n] + … + bias[n]      in float32, rounded once.

How many pieces there are depends on the weight's shape alone, not on the rows and not on the GPU, so that a row has the
same bits in any batch.

*Products.* Small integers are exact in bfloat16, and float32 is the sum of three bfloat16: three products by tensor
cores, smallest part first, give a float32's product (rows that are not finite become NaN).

Knows nothing of weights' layouts. Everything is on the current device. Imports Triton: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
"""Callers with more rows do better with another product; these are right for any number."""

PROGRAMS = 264
"""So many programs are wanted at least, two for each processor of an H200. By arithmetic; not measured on a GPU."""

BLOCK = 1024
"""Outputs per program of the sum."""
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def split(num_blocks: int, num_chunks: int) -> tuple[int, int]:
    """(pieces, chunks per piece), none of them empty; num_blocks: programs for one piece and one tile of rows."""
    wanted = max(1, min(PROGRAMS // max(1, num_blocks), num_chunks))
    per_split = max(1, -(-num_chunks // wanted))
    return max(1, -(-num_chunks // per_split)), per_split


def sum_splits(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """partial: [splits, r, n] float32; bias: [n] or None; out: [r, n], float32, bfloat16 or float16."""
    num_splits, num_rows, width = partial.shape
    assert partial.is_contiguous()
    assert partial.dtype == torch.float32
    assert out.shape == (num_rows, width)
    assert out.is_contiguous()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())
    if out.numel():
        _sum_splits_kernel[(num_rows, -(-width // BLOCK))](
            *(partial, bias, out, num_rows, width, num_splits, BLOCK), **OPTIONS
        )


def sum_splits_reference(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`sum_splits` in plain torch, in the dtype of its arguments."""
    total = partial.sum(0)
    out.copy_(total if bias is None else total + bias)


def sum_splits_bytes(num_splits: int, num_rows: int, width: int, dtype: torch.dtype) -> int:
    """What memory must move: partial sums once, and the result. An H200's cache holds most of it."""
    return num_rows * width * (4 * num_splits + dtype.itemsize)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _sum_splits_kernel(  # type: ignore[no-untyped-def]
    partial, bias, out, num_rows, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block of outputs)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK
    is_inside = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for piece in tl.static_range(SPLITS):
        at = partial + (row + num_rows.to(tl.int64) * piece) * width + column
        total += tl.load(at, mask=is_inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def dot(rows, values, total, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + rows @ values; values: numbers that are exact in bfloat16 and in the rows' dtype; total: float32."""
    if rows.dtype == tl.float32:
        first = rows.to(tl.bfloat16)
        rest = rows - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        total = _dot(third, values, total, INTERPRETED)
        total = _dot(second, values, total, INTERPRETED)
        return _dot(first, values, total, INTERPRETED)
    else:
        return _dot(rows, values, total, INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(rows, values, total, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly
        return tl.dot(rows.to(tl.float32), values.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(rows, values.to(rows.dtype), total)
