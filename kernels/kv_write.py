"""New keys and values put into the paged KV cache, keys and values of all heads in one launch, in Triton.

    keys[slot // block_size, slot % block_size] = key[t]        and values likewise, where slot = slots[t] >= 0

The cache's layout and the slots are those of vLLM's paged attention (Kwon et al. 2023). Numbers are copied, so kernel
and reference are equal bit for bit. A slot of -1 belongs to a row that is padding: nothing is read or written for it,
and so a captured step of fixed shape can hold fewer rows than it has room for. No slot may come twice.

Knows nothing of positions, nor of which blocks belong to whom; everything is on the current device. Imports Triton,
which only Linux has: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ELEMENTS = 4096
"""The most keys, and as many values, that one program holds; more heads are more programs."""

MAX_WARPS = 8
"""Warps are as many as give a thread 16 bytes, up to these. Chosen by arithmetic; not measured on a GPU."""


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] of T tokens at `slots` [T] int64, block * block_size + offset; -1:
    nowhere.

    keys [num_blocks, block_size, Hkv, D], values [num_blocks, block_size, Hkv, Dv]: one dtype, of any kind of number.
    All strides are free, but for the last, which is 1.
    """
    num_rows, num_heads, key_dim = key.shape
    value_dim = value.shape[2]
    assert slots.shape == (num_rows,)
    assert slots.dtype == torch.int64
    assert value.shape[:2] == key.shape[:2]
    assert keys.shape[:2] == values.shape[:2]
    assert keys.shape[2:] == key.shape[1:]
    assert values.shape[2:] == value.shape[1:]
    assert keys.dtype == values.dtype == key.dtype == value.dtype
    assert slots.stride(0) == 1 or num_rows <= 1
    assert keys.stride(3) == values.stride(3) == key.stride(2) == value.stride(2) == 1
    if num_rows == 0:
        return
    key_width, value_width = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    width = max(key_width, value_width)
    heads = min(triton.next_power_of_2(num_heads), max(1, MAX_ELEMENTS // width))
    _write_kv_kernel[(num_rows, triton.cdiv(num_heads, heads))](
        *(slots, key, _row_step(key), key.stride(1), keys, *keys.stride()[:3]),
        *(value, _row_step(value), value.stride(1), values, *values.stride()[:3]),
        *(keys.shape[1], num_heads, heads, key_dim, key_width, value_dim, value_width),
        num_warps=min(MAX_WARPS, max(1, heads * width * key.dtype.itemsize // (16 * 32))),
        enable_fp_fusion=True,
    )


def _row_step(x: Tensor) -> int:
    """From one row to the next. Where there is one only, any number is right, and 1 would be compiled anew."""
    return x.stride(0) if len(x) > 1 else 0


def write_kv_reference(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """`write_kv` in plain torch."""
    is_real = slots >= 0
    block_size = keys.shape[1]
    blocks, offsets = slots[is_real] // block_size, slots[is_real] % block_size
    keys[blocks, offsets] = key[is_real]
    values[blocks, offsets] = value[is_real]


def write_kv_bytes(num_rows: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """What memory must move for `write_kv` of `num_rows` rows that are no padding: slots once, the rest there and
    back."""
    return num_rows * (8 + 2 * num_kv_heads * (key_dim + value_dim) * dtype.itemsize)


# Names of arguments, not shapes: each tensor is followed by its strides in elements.


@triton.jit  # type: ignore[untyped-decorator]
def _write_kv_kernel(  # type: ignore[no-untyped-def]
    slots, key, key_row, key_head, keys, keys_block, keys_offset, keys_head,
    value, value_row, value_head, values, values_block, values_offset, values_head,
    BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (row, block of heads)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        head = (tl.arange(0, HEADS) + tl.program_id(1) * HEADS).to(tl.int64)[:, None]
        key_at = tl.arange(0, KEY_WIDTH)[None, :]
        value_at = tl.arange(0, VALUE_WIDTH)[None, :]
        is_key = (head < NUM_HEADS) & (key_at < KEY_DIM)
        is_value = (head < NUM_HEADS) & (value_at < VALUE_DIM)
        own_key = tl.load(key + row * key_row + head * key_head + key_at, mask=is_key)
        own_value = tl.load(value + row * value_row + head * value_head + value_at, mask=is_value)
        key_to = keys + block * keys_block + offset * keys_offset + head * keys_head + key_at
        value_to = values + block * values_block + offset * values_offset + head * values_head + value_at
        tl.store(key_to, own_key, mask=is_key)
        tl.store(value_to, own_value, mask=is_value)
