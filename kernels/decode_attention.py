"""Attention of decode rows, one query each, over the paged KV cache, reading keys that several rows share once.

A row's keys are cut into splits at fixed positions (`kernels.decode_work`), as Flash-Decoding (Dao et al. 2023) does,
and the splits' results are merged. With s the score of a key, in base 2 after the soft cap, over the keys that the row
sees in split i, and S the sink's logit in base 2, if there is one:

    lse[i] = log2 Σ 2^s                     o[i] = Σ 2^(s - lse[i]) · v
    out    = Σ_i 2^(lse[i]) · o[i]  /  (Σ_i 2^(lse[i]) + 2^S)

which is the softmax over all keys that the row sees, because 2^(lse[i]) · o[i] = Σ 2^s · v. Inside a split the same
identity merges blocks of keys (online softmax, Milakov and Gimelshein 2018). Exponents are taken relative to a maximum.

One program computes one item, up to `members_per_item` rows and the query heads of one key head, as one tile whose
shape is the same for one member as for many. No row of a product reads another, and blocks of keys that a row does not
see leave its sums as they are. A row's result is therefore the same bits whatever the batch holds and whoever shares
its keys, provided that the hardware treats the rows of a product alike; and that no number that another member of the
item sees, but this row does not, is infinite or NaN: a plan lets these differ by a window's edge only.

Everything is on the current device. Knows nothing of layers, branches, or how the cache is written. Imports Triton,
which only Linux has: import it where there is a GPU.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.decode_work import SPLIT, TILE, DecodeWork, members_per_item
from cadenza.kernels.ops import is_interpreted

LOOP_BYTES = 16 * 1024
"""Keys and values of one head that a program multiplies at once. Pipelined, two to three times that is on its way."""

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU. Two of the stages hold ids of
# blocks, on which the loads of keys depend. Fusion of products and sums is said, because Triton's default changes with
# its version, and the last bit with it.
OPTIONS = {"num_warps": 4, "num_stages": 5, "enable_fp_fusion": True}
MOST_KEYS = 64

OPTIONS_FLOAT32 = {"num_warps": 8, "num_stages": 5, "enable_fp_fusion": True}
MOST_KEYS_FLOAT32 = 16
"""Products are not tensor cores': more keys at once spill on sm_90."""

OPTIONS_LONG = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
"""Where the fewest keys, 16, are more than LOOP_BYTES: heads of 512, or of 256 in float32."""

MERGE_BLOCK = 32
"""Splits per step of the merge."""
MERGE_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    work: DecodeWork,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[R, H, Dv] contiguous, of q's dtype, or `out`, which is so: softmax(q kᵀ · scale) v over the keys that each row
    sees.

    q: [R, H, D], rows and heads at any distance. keys: [num_blocks, block_size, Hkv, D], values: [.., Dv], both of q's
    dtype, float32, bfloat16 or float16, at any distances but the last. window: a row sees the positions above its own
    less `window`; None: all up to its own. softcap: Gemma 2's limit, tanh(s / softcap) · softcap, on scores. sinks:
    [H], one more logit in each head's denominator, as in gpt-oss.
    """
    num_rows, num_heads, dim = q.shape
    _, block_size, num_kv_heads, value_dim = values.shape
    group = num_heads // num_kv_heads
    num_items, size = work.members.shape
    assert keys.shape == (*values.shape[:3], dim)
    assert q.dtype == keys.dtype == values.dtype
    assert q.stride(2) == keys.stride(3) == values.stride(3) == 1
    assert group * num_kv_heads == num_heads
    assert size == members_per_item(group), "the plan is for another number of heads per group"
    assert work.blocks.shape == (num_items, SPLIT // block_size), "the plan is for another size of blocks"
    assert work.positions.shape == (num_rows,)
    assert window is None or window > 0
    assert work.window is None or (window is not None and window <= work.window)
    assert sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous())
    if out is None:
        out = torch.empty(num_rows, num_heads, value_dim, dtype=q.dtype, device=q.device)
    assert out.shape == (num_rows, num_heads, value_dim)
    assert out.is_contiguous()
    if num_rows == 0:
        return out
    partials = torch.empty(work.num_partials, num_heads, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(work.num_partials, num_heads, dtype=torch.float32, device=q.device)
    if num_items:
        block, options = _launch(dim, value_dim, q.dtype)
        # The distance of a single row may be any number, for which Triton would compile another kernel.
        row_stride = q.stride(0) if num_rows > 1 else num_heads * dim
        _split_kernel[(num_items * num_kv_heads,)](
            *(q, row_stride, q.stride(1), keys, *keys.stride()[:3], values, *values.stride()[:3]),
            *(work.members, work.splits, work.blocks, work.positions, work.firsts, partials, lse),
            *(float(scale), float(softcap or 1.0), softcap is not None, window or 0),
            *(num_kv_heads, group, size, max(TILE, _padded(group)), SPLIT, block_size),
            *(block, dim, value_dim, _padded(dim), _padded(value_dim)),
            is_interpreted(q),
            **options,
        )
    _merge_kernel[(num_rows * num_heads,)](
        *(out, partials, lse, work.positions, work.firsts, sinks, sinks is not None, window or 0),
        *(num_heads, SPLIT, MERGE_BLOCK, value_dim, _padded(value_dim)),
        **MERGE_OPTIONS,
    )
    return out


def decode_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    work: DecodeWork,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain torch, in the dtype of its arguments (float64 for a truth)."""
    num_rows, num_heads, _ = q.shape
    num_kv_heads = keys.shape[2]
    items, lanes = (work.members >= 0).nonzero(as_tuple=True)
    rows, splits = work.members[items, lanes].long(), work.splits[items].long()
    num_splits = int(work.splits.max()) + 1 if len(work.splits) else 1
    tables = work.blocks.new_zeros(num_rows, num_splits, SPLIT // keys.shape[1])
    tables[rows, splits] = work.blocks[items]
    k, v = (part[tables.flatten(1).long()].flatten(1, 2) for part in (keys, values))  # [R, keys, Hkv, dim]
    position, key = work.positions[:, None], torch.arange(num_splits * SPLIT, device=q.device)
    is_seen = key <= position
    if window is not None:
        is_seen &= key > position - window
    v = v.masked_fill(~is_seen[:, :, None, None], 0.0)
    scores = torch.einsum("rkgd,rnkd->rkgn", q.view(num_rows, num_kv_heads, -1, q.shape[2]), k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~is_seen[:, None, None, :], -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, num_kv_heads, -1, 1).expand(num_rows, -1, -1, -1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(key)]
    weights = weights.masked_fill(position[:, :, None, None] < 0, 0.0)
    result = torch.einsum("rkgn,rnkd->rkgd", weights, v).reshape(num_rows, num_heads, values.shape[3])
    return result if out is None else out.copy_(result)


def decode_attention_bytes(q: Tensor, keys: Tensor, values: Tensor, work: DecodeWork) -> int:
    """What memory must move for `decode_attention` without a window: keys and values that some row sees once each,
    queries and results. Splits' results, which stay in the cache where they fit, are not counted. Waits for the device.
    """
    block_size, num_kv_heads, dim = keys.shape[1:]
    value_dim = values.shape[3]
    members, splits, blocks = (part.cpu().numpy() for part in (work.members, work.splits, work.blocks))
    last = np.where(members >= 0, work.positions.cpu().numpy()[members], -1).max(axis=1, initial=-1)
    starts = splits[:, None] * SPLIT + np.arange(blocks.shape[1]) * block_size
    seen = np.zeros(len(keys), np.int64)
    np.maximum.at(seen, blocks, np.clip(last[:, None] + 1 - starts, 0, block_size))
    numbers = int(seen.sum()) * num_kv_heads * (dim + value_dim) + q.numel() + q.numel() // dim * value_dim
    return numbers * q.dtype.itemsize


# Names of arguments, not shapes: strides are in elements; the rest as in `DecodeWork` and `decode_attention`.


@triton.jit  # type: ignore[untyped-decorator]
def _split_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, keys, k_block_stride, k_stride, k_head_stride,
    values, v_block_stride, v_stride, v_head_stride,
    members, splits, blocks, positions, firsts, partials, lse, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (item, key head), heads next to each other, as they are in the cache: a tile of members' queries over
    the keys of one split."""
    item = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    k_head = kv_head.to(tl.int64) * k_head_stride
    v_head = kv_head.to(tl.int64) * v_head_stride
    lane = tl.arange(0, TILE)
    member = lane // GROUP
    row = tl.load(members + item * MEMBERS + member, mask=member < MEMBERS, other=-1)
    is_used = row >= 0
    position = tl.load(positions + row, mask=is_used, other=-1)
    split = tl.load(splits + item)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.max(position, 0) + 1)
    if WINDOW:
        begin = tl.maximum(begin, tl.min(tl.where(is_used, position, 2147483647), 0) - (WINDOW - 1))
    if begin >= end:
        return
    head = kv_head * GROUP + lane % GROUP
    d = tl.arange(0, PADDED_D)
    dv = tl.arange(0, PADDED_DV)
    query = tl.load(
        q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :],
        mask=is_used[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly
        query = query.to(tl.float32)
    most = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.full((TILE,), 0.0, tl.float32)
    result = tl.full((TILE, PADDED_DV), 0.0, tl.float32)
    # From a multiple of BLOCK, wherever the window of whichever member begins.
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        key = tl.arange(0, BLOCK) + start
        is_inside = (key >= begin) & (key < end)  # of what lies outside, nothing may be read: it may be NaN
        block = tl.load(blocks + item * (SPLIT // BLOCK_SIZE) + key % SPLIT // BLOCK_SIZE).to(tl.int64)
        within = key % BLOCK_SIZE
        k = tl.load(
            keys + (block * k_block_stride + within * k_stride + k_head)[None, :] + d[:, None],
            mask=is_inside[None, :] & (d < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            values + (block * v_block_stride + within * v_stride + v_head)[:, None] + dv[None, :],
            mask=is_inside[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        score = tl.dot(query, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = _tanh(score / softcap) * softcap
        is_seen = key[None, :] <= position[:, None]
        if WINDOW:
            is_seen &= key[None, :] > position[:, None] - WINDOW
        score = tl.where(is_seen, score * 1.4426950408889634, float("-inf"))
        new_most = tl.maximum(most, tl.max(score, 1))
        base = tl.where(new_most == float("-inf"), 0.0, new_most)  # -inf - -inf is NaN
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        most = new_most
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    partial = (tl.load(firsts + row, mask=is_used, other=0) + split).to(tl.int64) * (KV_HEADS * GROUP) + head
    tl.store(
        partials + partial[:, None] * DV + dv[None, :], result, mask=is_used[:, None] & (dv < DV)[None, :]
    )
    tl.store(lse + partial, most + tl.log2(total), mask=is_used)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    out, partials, lse, positions, firsts, sinks, HAS_SINKS: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
):  # fmt: skip
    """Program (row, head), heads next to each other: the splits that the row sees, BLOCK at a time, in order."""
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    position = tl.load(positions + row)
    first = tl.load(firsts + row)
    end = (position + SPLIT) // SPLIT
    begin = 0
    if WINDOW:
        begin = tl.maximum(position - (WINDOW - 1), 0) // SPLIT
    dv = tl.arange(0, PADDED_DV)
    most = float("-inf")
    total = 0.0
    if HAS_SINKS:
        most = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    result = tl.full((PADDED_DV,), 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        split = tl.arange(0, BLOCK) + start
        is_inside = split < end
        partial = (split + first).to(tl.int64) * HEADS + head
        own = tl.load(lse + partial, mask=is_inside, other=float("-inf"))
        part = tl.load(
            partials + partial[:, None] * DV + dv[None, :],
            mask=is_inside[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        new_most = tl.maximum(most, tl.max(own, 0))
        weight = tl.exp2(own - new_most)
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weight, 0)
        result = result * shrink + tl.sum(weight[:, None] * part, 0)
        most = new_most
    result = result / tl.where(total == 0.0, 1.0, total)  # of padding, whose result is 0
    at = out + (row.to(tl.int64) * HEADS + head) * DV + dv
    tl.store(at, result.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """From an exponential of what is never above 0, which cannot overflow."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


def _launch(dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """(keys that a program multiplies at once, a power of two and at least a tensor core's 16; options)"""
    fitting = LOOP_BYTES // (2 * _padded(max(dim, value_dim)) * dtype.itemsize)
    if fitting < 16:
        return 16, OPTIONS_LONG
    if dtype == torch.float32:
        return min(fitting, MOST_KEYS_FLOAT32), OPTIONS_FLOAT32
    return min(fitting, MOST_KEYS), OPTIONS


def _padded(dim: int) -> int:
    """The next power of two, which is what a program's arrays must measure, and at least a tensor core's 16."""
    return max(16, 1 << (dim - 1).bit_length())
