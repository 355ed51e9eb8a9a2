"""Penalties, bias and bans of a few rows of logits, applied to float32 copies of those rows.

What edits a row may want (repetition, Keskar et al. 2019; frequency and presence, OpenAI; DRY; logit_bias; bans) comes
down to one product or quotient and one sum for each of its tokens:

    x' = -inf                                            where offset = -inf: a ban, whatever x is, NaN too
    x' = (x / repetition if x > 0 else x * repetition) + offset          elsewhere, in float32

Both forms round the quotient (or product), then the sum, so kernel and reference agree bit for bit. A logit of -inf
stays -inf, one of +inf stays +inf, and NaN stays NaN: saying so is for whoever reads the copies. Tokens without an edit
are copied exactly; columns between the vocabulary and the padded row stride are -inf.

Edits must be of distinct (row, token) pairs: whoever makes them has added up what belongs to one token. Repetition is
finite and above 0, an offset finite or -inf. Knows nothing of requests, of what a token has been repeated, or of the
order in which several penalties apply. Imports Triton, which only Linux has: import it where there is a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16
"""Elements: rows of the copies begin at multiples of 64 bytes, and Triton knows of their stride that it is one."""

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU.
COPY_BLOCK = 4096
SCATTER_BLOCK = 128
COPY_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
SCATTER_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Edits:
    """n edits on the device, each [n]; at most one for a token of a row."""

    rows: Tensor
    """int32, of the copies."""
    tokens: Tensor
    """int32, below V."""
    repetition: Tensor
    """float32; 1: nothing."""
    offset: Tensor
    """float32, added after that; -inf bans."""


def edited_rows(logits: Tensor, logits_rows: Tensor, edits: Edits) -> Tensor:
    """[E, V] float32 copies of rows `logits_rows` [E] int32 of logits [L, V], edited; `logits` stays as it is.

    logits: float32, bfloat16 or float16, rows at any distance. A row may be copied several times. The result is a view
    of rows whose stride is a multiple of 16.
    """
    num_columns = logits.shape[1]
    assert logits.stride(1) == 1
    assert logits_rows.dtype == torch.int32
    for indices in (edits.rows, edits.tokens):
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
    for values in (edits.repetition, edits.offset):
        assert values.dtype == torch.float32
        assert values.is_contiguous()
    stride = -(-num_columns // ALIGNMENT) * ALIGNMENT
    copies = torch.empty(len(logits_rows), stride, dtype=torch.float32, device=logits.device)
    if len(copies):
        _copy_kernel[(len(copies), -(-stride // COPY_BLOCK))](
            *(logits, logits.stride(0), logits_rows.contiguous(), copies, num_columns, stride, COPY_BLOCK),
            **COPY_OPTIONS,
        )
    n = len(edits.rows)
    if n and len(copies):
        _scatter_kernel[(-(-n // SCATTER_BLOCK),)](
            *(copies, stride, edits.rows, edits.tokens, edits.repetition, edits.offset, n, SCATTER_BLOCK),
            **SCATTER_OPTIONS,
        )
    return copies[:, :num_columns]


def edited_rows_reference(logits: Tensor, logits_rows: Tensor, edits: Edits) -> Tensor:
    """`edited_rows` in plain torch: float64 for float64 logits, else float32; contiguous."""
    copies = logits[logits_rows.long()].to(torch.promote_types(logits.dtype, torch.float32))
    at = (edits.rows.long(), edits.tokens.long())
    values, repetition, offset = copies[at], edits.repetition.to(copies.dtype), edits.offset.to(copies.dtype)
    changed = torch.where(values > 0, values / repetition, values * repetition) + offset
    copies[at] = torch.where(offset == -torch.inf, -torch.inf, changed)
    return copies


def edited_rows_bytes(num_rows: int, num_columns: int, num_edits: int, dtype: torch.dtype) -> int:
    """What memory must move: each row once in and once out, and the edits; what these change is in flight anyway."""
    return num_rows * (num_columns * (dtype.itemsize + 4) + 4) + num_edits * 16


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    logits, logits_stride, logits_rows, copies, V, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (copy, block of columns). logits: [any, V]; copies: [E, stride]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    source = logits + tl.load(logits_rows + row).to(tl.int64) * logits_stride
    out = copies + row * stride + column
    if start + BLOCK <= V:  # without a mask, whose ragged end would have all columns loaded one by one
        tl.store(out, tl.load(source + column).to(tl.float32))
    else:
        values = tl.load(source + column, mask=column < V, other=float("-inf")).to(tl.float32)
        tl.store(out, values, mask=column < stride)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _scatter_kernel(  # type: ignore[no-untyped-def]
    copies, stride, rows, tokens, repetition, offset, n, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of edits)."""
    edit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_edit = edit < n
    row = tl.load(rows + edit, mask=is_edit, other=0).to(tl.int64)
    at = copies + row * stride + tl.load(tokens + edit, mask=is_edit, other=0)
    value = tl.load(at, mask=is_edit, other=0.0)
    factor = tl.load(repetition + edit, mask=is_edit, other=1.0)
    added = tl.load(offset + edit, mask=is_edit, other=0.0)
    # Rounded as a CPU divides; and a product that may turn out a quotient is not fused with the sum.
    penalized = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    banned = added == float("-inf")
    tl.store(at, tl.where(banned, float("-inf"), penalized + added), mask=is_edit)
