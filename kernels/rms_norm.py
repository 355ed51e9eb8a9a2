"""Root-mean-square norm of rows (Zhang and Sennrich 2019), alone or of a residual sum, one launch.

    s = x + residual                                  rounded to the dtype of x, as torch's sum is; x itself without one
    n = s / √(mean(s²) + eps)                         float32
    out = n · (weight + offset)                       rounded once                          (Gemma's: offset = 1)
    out = round(n) · weight                           n and the product rounded, each to the dtype (Llama's)

`rounds_first` tells the two families of transformers' models apart, which are the same in float32. The kernel's sums
have one order for every row of a width, so that a row's bits do not depend on what else there is. Rows of up to
`MAX_BLOCK` elements stay in registers; longer ones are read twice, the second time mostly from the cache.

Knows nothing of layers. Imports Triton, which only Linux has: import it where there is a GPU.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16384
"""Elements of the longest rows that stay in registers."""

MIN_TILE = 1024
"""Elements per program: short rows, such as those of heads, share one."""

# Warps by elements per program: 8 or 16 elements per thread, and 32 in the longest rows' loop. Chosen by arithmetic and
# by what compiles without spilling; not measured on a GPU.
WARPS = {1024: 4, 2048: 4, 4096: 8, 8192: 16, 16384: 32}
LOOP_BLOCK = 8192


class _Rows(NamedTuple):
    """Where rows lie: row r = (a, b) with b < inner begins at a * outer_stride + b * inner_stride."""

    inner: int
    outer_stride: int
    inner_stride: int


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool
) -> Tensor:
    """The norm of each row of x [..., d], contiguous in x's shape and dtype.

    x: float32, bfloat16 or float16; elements of a row next to each other, rows anywhere. weight: [d] contiguous of any
    such dtype, of x's where rounds_first; None: ones. offset is added to the weight, where it is not rounds_first.
    """
    x, out = _with_next_elements(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, offset, rounds_first, None, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """(x + residual, its norm): x and residual [..., d] of one shape and dtype; otherwise as `rms_norm`."""
    assert x.shape == residual.shape
    assert x.dtype == residual.dtype
    x, residual = _with_next_elements(x), _with_next_elements(residual)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, eps, offset, rounds_first, total, out)
    return total, out


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool
) -> Tensor:
    """`rms_norm` in plain torch, in float32 or the wider dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if rounds_first:
        return normed.to(x.dtype) * weight
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps, offset=offset, rounds_first=rounds_first)


def rms_norm_bytes(num_rows: int, width: int, dtype: torch.dtype, *, has_residual: bool = False) -> int:
    """What memory must move: rows in and out, with a residual twice so many, and the weight once."""
    return (num_rows * (4 if has_residual else 2) + 1) * width * dtype.itemsize


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    rounds_first: bool,
    total: Tensor | None,
    out: Tensor,
) -> None:
    width = x.shape[-1]
    if weight is not None:
        assert weight.shape == (width,)
        assert weight.is_contiguous()
        assert not rounds_first or (weight.dtype == x.dtype and offset == 0.0)
    num_rows = x.numel() // width if width else 0
    if not num_rows:
        return
    x, rows = _with_rows(x)
    residual, other = (None, rows) if residual is None else _with_rows(residual)
    kernel, tile_rows, blocks, options = _plan(width)
    kernel[(-(-num_rows // tile_rows),)](
        *(x, *rows, residual, *other, weight, total, out, num_rows, eps),
        *(width, *blocks, offset, rounds_first),
        **options,
    )


@functools.cache
def _plan(width: int) -> tuple[Any, int, tuple[int, ...], dict[str, Any]]:
    """(kernel, rows per program, its blocks, options)."""
    options = {"num_stages": 1, "enable_fp_fusion": True}
    block = triton.next_power_of_2(width)
    if block > MAX_BLOCK:
        return _long_rms_norm_kernel, 1, (LOOP_BLOCK,), {**options, "num_warps": WARPS[LOOP_BLOCK]}
    tile_rows = max(1, MIN_TILE // block)
    warps = WARPS[max(block, MIN_TILE)]
    return _rms_norm_kernel, tile_rows, (tile_rows, block), {**options, "num_warps": warps}


def _with_rows(x: Tensor) -> tuple[Tensor, _Rows]:
    """x, in memory of its own where its rows lie at distances of more than two kinds."""
    rows = _rows(x)
    if rows is None:
        x = x.contiguous()
        rows = _Rows(1, x.shape[-1], 0)
    return x, rows


def _with_next_elements(x: Tensor) -> Tensor:
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> _Rows | None:
    """None: the rows lie at distances of more than two kinds."""
    if x.is_contiguous():
        return _Rows(1, x.shape[-1], 0)
    sizes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and sizes[-1][1] == stride * size:
            sizes[-1] = (sizes[-1][0] * size, stride)
        else:
            sizes.append((size, stride))
    if len(sizes) > 2:
        return None
    if len(sizes) == 2:
        return _Rows(sizes[1][0], sizes[0][1], sizes[1][1])
    return _Rows(1, sizes[0][1] if sizes else x.shape[-1], 0)


@triton.jit(do_not_specialize=["x_inner", "residual_inner", "num_rows"])  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, x_inner, x_outer_stride, x_inner_stride,
    residual, residual_inner, residual_outer_stride, residual_inner_stride,
    weight, total, out, num_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows)."""
    row = tl.arange(0, ROWS) + tl.program_id(0) * ROWS
    column = tl.arange(0, BLOCK)
    is_inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    outs = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    begins = _begins(row, x_inner, x_outer_stride, x_inner_stride)
    values = tl.load(x + begins[:, None] + column[None, :], mask=is_inside, other=0.0).to(tl.float32)
    if residual is not None:
        begins = _begins(row, residual_inner, residual_outer_stride, residual_inner_stride)
        at = residual + begins[:, None] + column[None, :]
        values += tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
        values = values.to(out.dtype.element_ty)
        tl.store(total + outs, values, mask=is_inside)
        values = values.to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)[:, None]
    if weight is not None:
        if ROUNDS_FIRST:
            normed = normed.to(out.dtype.element_ty).to(tl.float32)
        gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + OFFSET
        normed *= gain[None, :]
    tl.store(out + outs, normed.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["x_inner", "residual_inner", "num_rows"])  # type: ignore[untyped-decorator]
def _long_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, x_inner, x_outer_stride, x_inner_stride,
    residual, residual_inner, residual_outer_stride, residual_inner_stride,
    weight, total, out, num_rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
):  # fmt: skip
    """Program (row): one pass for the squares, one for the result, which adds anew rather than read what it wrote."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * WIDTH
    x += _begins(row, x_inner, x_outer_stride, x_inner_stride)
    if residual is not None:
        residual += _begins(row, residual_inner, residual_outer_stride, residual_inner_stride)
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = tl.arange(0, BLOCK) + start
        values = _sum_of(x, residual, column, column < WIDTH, out.dtype.element_ty).to(tl.float32)
        squares += values * values
    scale = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    for start in range(0, WIDTH, BLOCK):
        column = tl.arange(0, BLOCK) + start
        is_inside = column < WIDTH
        values = _sum_of(x, residual, column, is_inside, out.dtype.element_ty)
        if residual is not None:
            tl.store(total + begin + column, values, mask=is_inside)
        normed = values.to(tl.float32) * scale
        if weight is not None:
            if ROUNDS_FIRST:
                normed = normed.to(out.dtype.element_ty).to(tl.float32)
            normed *= tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32) + OFFSET
        tl.store(out + begin + column, normed.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _begins(row, inner, outer_stride, inner_stride):  # type: ignore[no-untyped-def]
    """Elements before a row."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of(x, residual, column, is_inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Part of a row of x, or of its sum with the residual, rounded to the dtype."""
    values = tl.load(x + column, mask=is_inside, other=0.0)
    if residual is not None:
        values = values.to(tl.float32) + tl.load(residual + column, mask=is_inside, other=0.0).to(tl.float32)
    return values.to(dtype)
