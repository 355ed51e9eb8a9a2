"""Attention of prompts' chunks over the paged KV cache, cached prefix and new tokens alike, in Triton.

A chunk's keys and values stand in the cache already (`kernels.kv_write`). A program computes a tile of `TILE`
positions and of one or two heads that share their keys, against one block of keys after another with the online softmax
of FlashAttention (Milakov and Gimelshein 2018, Dao 2023), in powers of two:

    s  = q kᵀ · scale · log2(e), with a cap: cap · log2(e) · tanh(q kᵀ · scale / cap); -inf where not visible
    m' = max(m, max s)       l' = l · 2^(m - m') + Σ 2^(s - m')       o' = o · 2^(m - m') + 2^(s - m') v
    softmax(s) v = o / l

which holds for any first m and l that stand for one more score: a sink's m = sink · log2(e), l = 1, o = 0 (gpt-oss).
Sums are in float32; weights are rounded to the values' dtype before the product, as FlashAttention does.

Tiles and blocks of keys stand at absolute multiples of their sizes, and a block in which a row sees nothing leaves that
row's numbers as they are. So a row's result is the same bits however its prompt was cut into chunks and whatever the
batch holds, provided that the hardware treats all rows of a product alike.

Knows nothing of layers, of positions' encoding, nor of rows that generate (`kernels.decode_attention`); everything is
on the current device. Imports Triton, which only Linux has: import it where there is a GPU.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.ops import is_interpreted
from cadenza.kernels.prefill_work import TILE, PrefillPlan, PrefillWork

CONFIGS = {
    # (bytes of a number, width of a head up to, heads per tile): keys per block, warps, stages
    (2, 64, 2): (64, 8, 3),
    (2, 64, 1): (64, 4, 3),
    (2, 128, 2): (64, 8, 3),
    (2, 128, 1): (32, 4, 3),
    (2, 256, 1): (32, 8, 3),
    (4, 64, 1): (32, 16, 1),
    (4, 128, 1): (32, 32, 1),
    (4, 256, 1): (16, 16, 1),
}
"""Two heads are taken where there is a row for them and they share their keys. Blocks of keys divide `TILE`.

Of three stages, Triton spends one on the block table's entry: keys and values are fetched one block ahead. Chosen by
arithmetic and by what compiles without spilling, within 99 KB of shared memory; not measured on a GPU."""


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    work: PrefillWork,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[T, H, Dv], contiguous and of q's dtype, or `out`, which may be a view: the results of the rows of `work`'s
    chunks. Other rows are neither read nor written.

    q [T, H, D], keys [num_blocks, block_size, Hkv, D], values [num_blocks, block_size, Hkv, Dv]: of one dtype, float32,
    bfloat16 or float16; all strides are free, but for the last, which is 1. A key is visible if it is not behind the
    row's position, nor `window` or more before it. sinks: [H].
    """
    num_rows, num_heads, key_dim = q.shape
    _, block_size, num_kv_heads, value_dim = values.shape
    assert q.dtype == keys.dtype == values.dtype
    assert keys.shape == (*values.shape[:3], key_dim)
    assert q.stride(2) == keys.stride(3) == values.stride(3) == 1
    assert num_heads % num_kv_heads == 0
    assert window is None or window > 0
    assert softcap is None or softcap > 0
    assert sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous())
    if out is None:
        out = torch.empty(num_rows, num_heads, value_dim, dtype=q.dtype, device=q.device)
    assert out.shape == (num_rows, num_heads, value_dim)
    assert out.stride(2) == 1
    if len(work.tiles) == 0:
        return out
    group = num_heads // num_kv_heads
    key_width, value_width = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    heads, block, num_warps, num_stages = _config(q.dtype, max(key_width, value_width), group)
    # Where there is one row only, any distance to the next is right, and 1 would be compiled anew.
    q_row, out_row = (part.stride(0) if num_rows > 1 else 0 for part in (q, out))
    _prefill_kernel[(num_heads // heads, len(work.tiles))](
        *(
            q,
            q_row,
            q.stride(1),
            keys,
            *keys.stride()[:3],
            values,
            *values.stride()[:3],
            out,
            out_row,
            out.stride(1),
        ),
        *(sinks, work.block_tables, work.block_tables.shape[1], work.starts, work.first_rows, work.num_rows),
        *(work.tiles, scale, window, softcap, block_size, group, heads, TILE, block),
        *(key_dim, key_width, value_dim, value_width, is_interpreted(q)),
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
    return out


def prefill_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    work: PrefillWork,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`prefill_attention` in plain torch, in the dtype of its arguments but at least float32 (float64 for a truth).
    Waits for the device."""
    group = q.shape[1] // keys.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if out is None:
        out = q.new_empty(*q.shape[:2], values.shape[3])
    chunks = torch.stack((work.starts, work.first_rows, work.num_rows), dim=1).tolist()
    for table, (start, first_row, num_rows) in zip(work.block_tables, chunks, strict=True):
        own = slice(first_row, first_row + num_rows)
        end = start + num_rows
        blocks = table[: -(-end // keys.shape[1])].long()
        k, v = (
            part[blocks].flatten(0, 1)[:end].to(dtype).repeat_interleave(group, dim=1)
            for part in (keys, values)
        )
        scores = torch.einsum("thd,shd->hts", q[own].to(dtype), k) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        ahead = (
            torch.arange(end, device=q.device)[None, :] - torch.arange(start, end, device=q.device)[:, None]
        )
        is_visible = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        scores = scores.masked_fill(~is_visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, num_rows, 1)], dim=2)
        weights = torch.softmax(scores, dim=2)[:, :, :end]
        out[own] = torch.einsum("hts,shd->thd", weights, v).to(out.dtype)
    return out


def prefill_attention_bytes(
    plan: PrefillPlan,
    num_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> int:
    """What memory must move: queries and results, and once for each chunk the keys and values that any of its rows
    sees. Tiles of a chunk share them through the cache; that chunks may have a prefix in common is not counted."""
    starts, num_rows = (part.astype(np.int64) for part in (plan.starts, plan.num_rows))
    unseen = 0 if window is None else np.maximum(0, starts - window + 1)
    num_keys = np.where(num_rows > 0, starts + num_rows - unseen, 0)
    numbers = int(num_rows.sum()) * num_heads + int(num_keys.sum()) * num_kv_heads
    return numbers * (key_dim + value_dim) * dtype.itemsize


def prefill_attention_flops(
    plan: PrefillPlan, num_heads: int, key_dim: int, value_dim: int, window: int | None = None
) -> int:
    """Of the two products, of what is visible alone. Long prompts are bound by these, not by memory."""
    num_pairs = 0
    for start, count in zip(plan.starts.tolist(), plan.num_rows.tolist(), strict=True):
        num_visible = np.arange(start + 1, start + count + 1)
        num_pairs += int(num_visible.sum() if window is None else np.minimum(num_visible, window).sum())
    return 2 * num_pairs * num_heads * (key_dim + value_dim)


def _config(dtype: torch.dtype, width: int, group: int) -> tuple[int, int, int, int]:
    """(heads per tile, keys per block, warps, stages)."""
    for (itemsize, most, heads), config in CONFIGS.items():
        if itemsize == dtype.itemsize and width <= most and group % heads == 0:
            return heads, *config
    raise ValueError(f"no configuration for heads of {width} numbers of {dtype}")


# Names of arguments, not shapes: q and out are [T, H, D], keys and values [num_blocks, block_size, Hkv, D], each
# followed by its strides in elements; the rest as in `PrefillWork`. Rows of a tile: head after head, by position.


@triton.jit(do_not_specialize=["table_stride"])  # type: ignore[untyped-decorator]
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, q_row, q_head, keys, keys_block, keys_offset, keys_head, values, values_block, values_offset, values_head,
    out, out_row, out_head, sinks, block_tables, table_stride, starts, first_rows, num_rows, tiles, scale,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (heads, tile)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    chunk = tl.load(tiles + tl.program_id(1) * 2)
    number = tl.load(tiles + tl.program_id(1) * 2 + 1)
    start = tl.load(starts + chunk)
    end = start + tl.load(num_rows + chunk)
    first = start + number * TILE
    table = block_tables + chunk.to(tl.int64) * table_stride
    head = (tl.program_id(0) * HEADS).to(tl.int64)
    row = (tl.load(first_rows + chunk) + number * TILE).to(tl.int64)
    lane = tl.arange(0, HEADS * TILE)
    position = first + lane % TILE
    keys += head // GROUP * keys_head
    values += head // GROUP * values_head
    key_at = tl.arange(0, KEY_WIDTH)[None, :]
    value_at = tl.arange(0, VALUE_WIDTH)[None, :]
    is_ours = (position < end)[:, None]
    q_at = (lane % TILE * q_row + lane // TILE * q_head)[:, None] + key_at
    queries = tl.load(q + row * q_row + head * q_head + q_at, mask=is_ours & (key_at < KEY_DIM), other=0.0)
    if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly
        queries = queries.to(tl.float32)
    if sinks is None:
        highest = tl.full((HEADS * TILE,), float("-inf"), tl.float32)
        total = tl.full((HEADS * TILE,), 0.0, tl.float32)
    else:
        highest = tl.load(sinks + head + lane // TILE).to(tl.float32) * LOG2E
        total = tl.full((HEADS * TILE,), 1.0, tl.float32)
    result = tl.full((HEADS * TILE, VALUE_WIDTH), 0.0, tl.float32)
    # [begin, full_begin) only some rows see, as [full_end, stop); those between all rows do
    begin, full_begin, full_end, stop = 0, 0, first, tl.minimum(first + TILE, end)
    if WINDOW is not None:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK * BLOCK
        full_begin = tl.minimum(tl.cdiv(tl.maximum(first + TILE - WINDOW, 0), BLOCK) * BLOCK, first)
        highest, total, result = _attend(
            queries, highest, total, result, position, begin, full_begin, stop, table,
            keys, keys_block, keys_offset,
            values, values_block, values_offset, scale,
            True, WINDOW, SOFTCAP, BLOCK_SIZE, BLOCK, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, INTERPRETED,
        )  # fmt: skip
    highest, total, result = _attend(
        queries, highest, total, result, position, full_begin, full_end, stop, table,
        keys, keys_block, keys_offset,
        values, values_block, values_offset, scale,
        False, WINDOW, SOFTCAP, BLOCK_SIZE, BLOCK, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, INTERPRETED,
    )  # fmt: skip
    highest, total, result = _attend(
        queries, highest, total, result, position, full_end, stop, stop, table,
        keys, keys_block, keys_offset,
        values, values_block, values_offset, scale,
        True, WINDOW, SOFTCAP, BLOCK_SIZE, BLOCK, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, INTERPRETED,
    )  # fmt: skip
    out_at = (lane % TILE * out_row + lane // TILE * out_head)[:, None] + value_at
    own = (result / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_row + head * out_head + out_at, own, mask=is_ours & (value_at < VALUE_DIM))


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    queries, highest, total, result, position, begin, end, stop, table,
    keys, keys_block, keys_offset, values, values_block, values_offset, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The online softmax's numbers after the blocks of keys from `begin` to `end`. MASKED: a row may not see all of
    them, and from `stop` on nothing was written to the cache."""
    LOG2E: tl.constexpr = 1.4426950408889634
    key_at = tl.arange(0, KEY_WIDTH)[None, :]
    value_at = tl.arange(0, VALUE_WIDTH)[None, :]
    for at in range(begin, end, BLOCK):
        key = tl.arange(0, BLOCK) + at
        if MASKED:
            is_key = (key < stop)[:, None] & (key_at < KEY_DIM)
            is_value = (key < stop)[:, None] & (value_at < VALUE_DIM)
            slot = tl.load(table + key // BLOCK_SIZE, mask=key < stop, other=0).to(tl.int64)
        else:
            is_key = key_at < KEY_DIM
            is_value = value_at < VALUE_DIM
            slot = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        key_to = slot * keys_block + (key % BLOCK_SIZE) * keys_offset
        value_to = slot * values_block + (key % BLOCK_SIZE) * values_offset
        own_keys = tl.load(keys + key_to[:, None] + key_at, mask=is_key, other=0.0)
        own_values = tl.load(values + value_to[:, None] + value_at, mask=is_value, other=0.0)
        if INTERPRETED:
            own_keys = own_keys.to(tl.float32)
            own_values = own_values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(own_keys), input_precision="ieee")
        if SOFTCAP is None:
            scores *= scale * LOG2E
        else:  # tanh(x) = 1 - 2 / (e^2x + 1), which infinity leaves finite
            power = tl.exp2(scores * (scale * (2 * LOG2E / SOFTCAP)))
            scores = SOFTCAP * LOG2E - (2 * SOFTCAP * LOG2E) / (power + 1.0)
        if MASKED:
            is_visible = key[None, :] <= position[:, None]
            if WINDOW is not None:
                is_visible &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(is_visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = new_highest
        if MASKED and WINDOW is not None:  # a row that has not seen anything yet
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        shrunk = tl.exp2(highest - shift)
        total = total * shrunk + tl.sum(weights, 1)
        result = tl.dot(
            weights.to(own_values.dtype), own_values, result * shrunk[:, None], input_precision="ieee"
        )
        highest = new_highest
    return highest, total, result
