"""A few rows times a weight of 4-bit integers in groups, on GPUs, in Triton: each word is read once, made 8 floats.

    y[m, n] = Σ_g s[g, n] * (Σ_k x[m, k] * (16 + q[n, k])) + (z[g, n] - 24 * s[g, n]) * (Σ_k x[m, k]) + bias[n]

with k over group g, which is x times the weight (q - 8) * s + z: nothing of the weight is rounded. 16 + q is made of q
without arithmetic, since these 4 bits are the first ones of the mantissa of a number between 16 and 32; Marlin (Frantar
et al. 2024) and before it Kim et al. 2022 ("Who says elephants can't run") make floats so. Tensor cores sum in float32,
the group's factors are applied to their sums in float32.

Words are laid out for that, [ceil(k / 128), n, 16] int32: word c of output n and of the 128 inputs from 128 t on has,
turned left by 3 bits, at bits 4j and 16 + 4j the integers of the inputs 128 t + 32 j + 2 c and the next one (j from 0
to 3). So one turn and one mask give two neighbours as the 16-bit pair that a tensor core reads, what a program loads
is one piece of memory, and no number changes threads between the load and the product.

A program computes 16 or 32 rows times 128 outputs over a piece of the inputs (`few_rows`). Both heights use the same
tensor-core instruction, 16 rows high, and sum in the same order: a row's bits do not depend on how many rows there are,
provided that the hardware treats the 16 rows of a product alike. Beyond `MOST_ROWS` it is better to `dequantize`.

Knows nothing of modules and of how integers are chosen. Everything is on the current device. Imports Triton, which only
Linux has: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.few_rows import dot, split, sum_splits
from cadenza.kernels.int4_words import CHUNK, WORDS, dequantize_reference
from cadenza.kernels.ops import is_interpreted

OUTPUTS = 128
"""Per program; must not depend on the number of rows."""
_PARTS = {2: 128, 4: 64}
"""Inputs at a time, at most, by bytes per element of x; they decide the order of summation."""
_OPTIONS = {
    2: {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True},
    4: {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
}
"""By bytes per element of x; warps decide the order of summation, too. Chosen by arithmetic and by what compiles
without spilling; not measured on a GPU."""
_REGISTERS = {
    (2, 16, 32): 144,
    (2, 16, 64): 128,
    (2, 16, 128): 128,
    (2, 32, 64): 232,
    (2, 32, 128): 232,
    (4, 16, 32): 208,
}
"""By bytes per element of x, rows per program and inputs at a time. Left to itself, ptxas aims at fewer here and there,
and spills; with 32 rows and groups of 32 it always does."""
_DEQUANTIZED_OUTPUTS = 32
_DEQUANTIZE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def int4_matmul(
    x: Tensor, words: Tensor, scales_and_zeros: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """[r, n] in x's dtype: x [r, k] float32, bfloat16 or float16, rows at any distance.

    words: [ceil(k / 128), n, 16] int32 as `int4_words.pack` makes them; scales_and_zeros: [groups, n, 2] bfloat16, of
    groups of 32, 64 or 128 inputs, at least as many as cover k; both may be cut along n. bias: [n] or None.
    """
    (num_rows, width), outputs = x.shape, words.shape[1]
    assert x.stride(1) == 1 or width == 1
    assert bias is None or (bias.shape == (outputs,) and bias.is_contiguous())
    pairs = _checked_pairs(words, scales_and_zeros, group_size, width)
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tile = 32 if num_rows > 16 and x.dtype.itemsize == 2 and group_size > 32 else 16
    part = min(group_size, _PARTS[x.dtype.itemsize])
    options = _OPTIONS[x.dtype.itemsize]
    num_blocks = -(-outputs // OUTPUTS)
    num_splits, per_split = split(num_blocks, len(words))
    is_whole = num_splits == 1
    sums = out
    if not is_whole:
        sums = torch.empty(num_splits, num_rows, outputs, dtype=torch.float32, device=x.device)
    _int4_matmul_kernel[(-(-num_rows // tile), num_blocks, num_splits)](
        *(x, x.stride(0), words, words.stride(0), pairs, pairs.stride(0), bias if is_whole else None, sums),
        *(num_rows, outputs, width, per_split),
        *(tile, OUTPUTS, CHUNK, WORDS, group_size, part, options["num_stages"], is_interpreted(x)),
        **options,
        maxnreg=_REGISTERS.get((x.dtype.itemsize, tile, part)),
    )
    if not is_whole:
        sum_splits(sums, bias, out)
    return out


def dequantize(
    words: Tensor, scales_and_zeros: Tensor, group_size: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[n, width] in dtype: the weight, rounded once. Arguments as of `int4_matmul`."""
    outputs = words.shape[1]
    pairs = _checked_pairs(words, scales_and_zeros, group_size, width)
    out = torch.empty(outputs, width, dtype=dtype, device=words.device)
    if out.numel():
        _dequantize_kernel[(-(-outputs // _DEQUANTIZED_OUTPUTS), len(words))](
            *(words, words.stride(0), pairs, pairs.stride(0), out, outputs, width),
            *(_DEQUANTIZED_OUTPUTS, CHUNK, WORDS, group_size),
            **_DEQUANTIZE_OPTIONS,
        )
    return out


def int4_matmul_reference(
    x: Tensor, words: Tensor, scales_and_zeros: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """`int4_matmul` in plain torch, in the dtype of x (float64 for a truth)."""
    y = x @ dequantize_reference(words, scales_and_zeros, group_size, x.shape[1], x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def int4_matmul_bytes(num_rows: int, outputs: int, width: int, group_size: int, dtype: torch.dtype) -> int:
    """What memory must move: the weight with its scales and zeros, the rows and the result once each."""
    return outputs * (width // 2 + width // group_size * 4) + num_rows * (outputs + width) * dtype.itemsize


def _checked_pairs(words: Tensor, scales_and_zeros: Tensor, group_size: int, width: int) -> Tensor:
    """[groups, n] int32: the scale in the low half, the zero in the high one."""
    assert words.dtype == torch.int32
    assert words.shape[0] == -(-width // CHUNK)
    assert words.shape[2] == WORDS
    assert words.stride()[1:] == (WORDS, 1)
    assert words.stride(0) * len(words) < 2**31
    assert group_size in (32, 64, 128)
    assert scales_and_zeros.dtype == torch.bfloat16
    assert scales_and_zeros.shape[1:] == (words.shape[1], 2)
    assert len(scales_and_zeros) * group_size >= width
    assert scales_and_zeros.stride()[1:] == (2, 1)
    return scales_and_zeros.view(torch.int32)[..., 0]


@triton.jit(do_not_specialize=["num_rows", "per_split"])  # type: ignore[untyped-decorator]
def _int4_matmul_kernel(  # type: ignore[no-untyped-def]
    x, x_stride, words, words_stride, pairs, pairs_stride, bias, out, num_rows, outputs, width, per_split,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, block of outputs, piece of the inputs); out is [pieces, num_rows, outputs]."""
    row = tl.arange(0, ROWS) + tl.program_id(0) * ROWS
    output = tl.arange(0, OUTPUTS) + tl.program_id(1) * OUTPUTS
    piece = tl.program_id(2)
    is_row = row < num_rows
    is_output = output < outputs
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    word_at = words + output[None, :] * WORDS + tl.arange(0, WORDS)[:, None]
    dtype: tl.constexpr = tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    first = piece * per_split
    # Stages are said of the loop, because otherwise only what goes to a product is fetched ahead: not the pairs.
    last = tl.minimum(first + per_split, tl.cdiv(width, CHUNK))
    for chunk in tl.range(first, last, num_stages=STAGES):
        word = tl.load(word_at + chunk * words_stride, mask=is_output[None, :], other=0)
        for part in tl.static_range(CHUNK // PART):
            start = chunk * CHUNK + part * PART
            k = tl.arange(0, PART) + start
            rows = tl.load(x_row + k[None, :], mask=is_row[:, None] & (k < width)[None, :], other=0.0)
            scale, zero = _scale_and_zero(
                pairs + (start // GROUP) * pairs_stride + output,
                output < tl.where(width > start, outputs, 0),  # beyond the last group there is none
            )
            values = _values(word, part, PART, OUTPUTS, dtype)
            sums = dot(rows, values, tl.full((ROWS, OUTPUTS), 0.0, tl.float32), INTERPRETED)
            total += sums * scale[None, :]
            total += tl.sum(rows.to(tl.float32), 1)[:, None] * (zero - 24.0 * scale)[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    at = out + (row + num_rows.to(tl.int64) * piece)[:, None] * outputs + output[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    words, words_stride, pairs, pairs_stride, out, outputs, width,
    OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, chunk of inputs)."""
    output = tl.arange(0, OUTPUTS) + tl.program_id(0) * OUTPUTS
    chunk = tl.program_id(1)
    is_output = output < outputs
    word_at = words + output[None, :] * WORDS + tl.arange(0, WORDS)[:, None]
    word = tl.load(word_at + chunk * words_stride, mask=is_output[None, :], other=0)
    for part in tl.static_range(CHUNK // GROUP):
        k = tl.arange(0, GROUP) + (chunk * CHUNK + part * GROUP)
        scale, zero = _scale_and_zero(
            pairs + (chunk * (CHUNK // GROUP) + part) * pairs_stride + output,
            output
            < tl.where(width > chunk * CHUNK + part * GROUP, outputs, 0),  # beyond the last group: none
        )
        value = (_values(word, part, GROUP, OUTPUTS, tl.float32) - 24.0) * scale[None, :] + zero[None, :]
        at = out + output.to(tl.int64)[None, :] * width + k[:, None]
        tl.store(at, value.to(out.dtype.element_ty), mask=is_output[None, :] & (k < width)[:, None])


@triton.jit
def _scale_and_zero(pair_at, is_there):  # type: ignore[no-untyped-def]
    """Float32, of two bfloat16 in a word: their bits are the upper ones of the float32."""
    pair = tl.load(pair_at, mask=is_there, other=0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def]
    word, part: tl.constexpr, PART: tl.constexpr, OUTPUTS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """[PART, OUTPUTS] in dtype: 16 + q of some inputs of a chunk; word: [16, OUTPUTS] int32.

    Joined pair by pair, which compilers see through: numbers stay in the threads that multiply them.
    """
    FIRST: tl.constexpr = part * (PART // 32)
    bits = word.to(tl.uint32, bitcast=True)
    if PART == 32:  # [c, n, low or high]
        return tl.reshape(tl.permute(_two(bits, FIRST, dtype), (0, 2, 1)), (PART, OUTPUTS))
    elif PART == 64:  # [c, n, low or high, j]
        four = tl.join(_two(bits, FIRST, dtype), _two(bits, FIRST + 1, dtype))
        return tl.reshape(tl.permute(four, (3, 0, 2, 1)), (PART, OUTPUTS))
    else:  # [c, n, low or high, j % 2, j // 2]
        first = tl.join(_two(bits, 0, dtype), _two(bits, 1, dtype))
        second = tl.join(_two(bits, 2, dtype), _two(bits, 3, dtype))
        return tl.reshape(tl.permute(tl.join(first, second), (4, 3, 0, 2, 1)), (PART, OUTPUTS))


@triton.jit  # type: ignore[untyped-decorator]
def _two(bits, j: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """[16, OUTPUTS, 2] in dtype: 16 + q of the integers j; bits: uint32."""
    # The first four bits of the mantissa are 6 to 9 of a float16, 3 to 6 of a bfloat16.
    START: tl.constexpr = 6 if dtype == tl.float16 else 3
    MASK: tl.constexpr = 0x03C003C0 if dtype == tl.float16 else 0x00780078
    SIXTEEN: tl.constexpr = 0x4C004C00 if dtype == tl.float16 else 0x41804180
    TURN: tl.constexpr = (4 * j + 35 - START) % 32
    if TURN > 0:
        bits = (bits >> TURN) | (bits << (32 - TURN))
    two = bits & MASK | SIXTEEN
    if dtype == tl.float32:  # as bfloat16, and that is the upper half of a float32
        low, high = two << 16, two & 0xFFFF0000
    else:
        low, high = (two & 0xFFFF).to(tl.uint16), (two >> 16).to(tl.uint16)
    return tl.join(low, high).to(dtype, bitcast=True)
