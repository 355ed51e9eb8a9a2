"""Attention over the paged KV cache, registered with transformers as the implementation "cadenza".

A step's rows are packed, [1, T]: no row is padding. What a row's result is made of never depends on what else
is in the batch, because the shape of every matrix product is a function of the row's own position alone:

    prompt rows     in tiles of `TILE` queries at fixed positions, against all keys up to the tile's end
    decode rows     one query each, against its own keys rounded up to a bucket (`bucket_length`)

Rows that share a shape are computed in one call. Keys beyond a row's position are masked, and contribute
exact zeros. Generated tokens are always computed as decode rows, also when a preempted branch recomputes
them, so that the recomputed cache equals the lost one bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cadenza.decoding.kv_cache import KVCache

NAME = "cadenza"
TILE = 64
MAX_GROUP_ROWS = 64  # bounds the memory of gathered keys and values
_QUERY_MULTIPLE = 4  # SDPA on a CPU sums in another order on threads whose scratch is not aligned to 16 bytes


def bucket_length(length: int) -> int:
    """The number of keys that a decode row of `length` keys is computed with: 64, 128, 192, 256, 384, 512, 768 …"""
    power = max(TILE, 1 << (length - 1).bit_length())
    three_quarters = power // 4 * 3
    return three_quarters if three_quarters % TILE == 0 and length <= three_quarters else power


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive prompt tokens of one branch. `start` is a multiple of TILE."""

    first_row: int
    num_rows: int
    start: int
    blocks: Tensor
    """[num_blocks] ids that cover every tile of the chunk to its end, padded with any id."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of equal bucket, of any branches."""

    first_row: int
    num_rows: int
    blocks: Tensor
    """[num_rows, bucket // block_size] block ids, padded with any id."""
    positions: Tensor
    """[num_rows] position of each query."""


@dataclass(slots=True)
class AttentionBatch:
    """What attention must know of one step. Masks are made once and shared by the layers that need the same."""

    cache: KVCache
    slots: Tensor
    """[T] where each row's key and value go."""
    chunks: Sequence[PromptChunk]
    groups: Sequence[DecodeGroup]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def tile_mask(self, start: int, like: Tensor, window: int | None) -> Tensor:
        """[TILE, start + TILE] additive causal mask of the tile that begins at position `start`."""
        key = (-1, start, window)
        if key not in self._masks:
            queries = torch.arange(start, start + TILE, device=like.device)[:, None]
            keys = torch.arange(start + TILE, device=like.device)[None, :]
            self._masks[key] = _additive(_visible(queries, keys, window), like.dtype)
        return self._masks[key]

    def group_mask(self, number: int, num_keys: int, like: Tensor, window: int | None) -> Tensor:
        """[num_rows, 1, 1, num_keys] additive mask of decode group `number`."""
        key = (number, num_keys, window)
        if key not in self._masks:
            queries = self.groups[number].positions[:, None]
            keys = torch.arange(num_keys, device=like.device)[None, :]
            self._masks[key] = _additive(_visible(queries, keys, window), like.dtype)[:, None, None, :]
        return self._masks[key]


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # transformers hands every attention function everything; `probe` proves that we use what matters
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, H, Dv].

    softcap: Gemma 2's tanh limit on scores. s_aux: gpt-oss' attention sinks, [H].
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    num_kv_heads, num_rows = key.shape[1:3]
    attention_batch.cache.write(
        layer, attention_batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    q = query[0].transpose(0, 1).reshape(num_rows, num_kv_heads, -1, query.shape[3])  # [T, Hkv, G, D]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    sinks = None if s_aux is None else s_aux.view(num_kv_heads, -1).to(q.dtype)
    call = _Call(attention_batch, layer, scale, sliding_window, softcap, sinks)
    parts = [*_decode_parts(call, q), *_prompt_parts(call, q)]  # in the order of the packed rows
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.flatten(1, 2).unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class _Call:
    """What stays the same for all rows of one layer."""

    batch: AttentionBatch
    layer: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[Hkv, G]."""


def _decode_parts(call: _Call, q: Tensor) -> Iterator[Tensor]:
    """q [T, Hkv, G, D]; one [num_rows, Hkv, G, Dv] for each decode group."""
    num_queries = q.shape[2]
    padding = -num_queries % _QUERY_MULTIPLE
    sinks = None if call.sinks is None else F.pad(call.sinks, (0, padding))[None, :, :, None]
    for number, group in enumerate(call.batch.groups):
        keys, values = call.batch.cache.read(call.layer, group.blocks)  # [B, L, Hkv, D]
        queries = q[group.first_row : group.first_row + group.num_rows]
        if padding:
            queries = F.pad(queries, (0, 0, 0, padding))
        mask = call.batch.group_mask(number, keys.shape[1], q, call.window)
        result = _attend(call, queries, keys.transpose(1, 2), values.transpose(1, 2), mask, sinks)
        yield result[:, :, :num_queries] if padding else result


def _prompt_parts(call: _Call, q: Tensor) -> Iterator[Tensor]:
    """q [T, Hkv, G, D]; one [num_rows, Hkv, G, Dv] for each tile of each prompt chunk."""
    num_queries = q.shape[2]
    sinks = None if call.sinks is None else call.sinks[:, :, None, None]
    for chunk in call.batch.chunks:
        keys, values = call.batch.cache.read(call.layer, chunk.blocks)  # [L, Hkv, D]
        for offset in range(0, chunk.num_rows, TILE):
            num_rows = min(TILE, chunk.num_rows - offset)
            first_row, end = chunk.first_row + offset, chunk.start + offset + TILE
            tile = q[first_row : first_row + num_rows]
            if num_rows < TILE:  # the last one of a prompt: computed at full size, as every other tile
                tile = F.pad(tile, (0, 0, 0, 0, 0, 0, 0, TILE - num_rows))
            # heads in the batch dimension, groups in the head dimension: keys are shared without a copy
            seen_keys, seen_values = (
                part[:end].transpose(0, 1)[:, None].expand(-1, num_queries, -1, -1) for part in (keys, values)
            )
            mask = call.batch.tile_mask(end - TILE, q, call.window)
            result = _attend(call, tile.permute(1, 2, 0, 3), seen_keys, seen_values, mask, sinks)
            yield result.permute(2, 0, 1, 3)[:num_rows]


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v over the last two dimensions, with the two variations SDPA lacks."""
    if call.softcap is None and sinks is None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    scores = (q @ k.transpose(-1, -2)).float() * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return weights[..., : k.shape[2]] @ v


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
