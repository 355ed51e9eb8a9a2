"""Attention on a CPU: torch's own, in shapes that make a row independent of the batch.

What a row's result is made of never depends on what else is in the batch, because the shape of every matrix product is
a function of the row's own position alone:

    prompt rows     in tiles of `TILE` queries at fixed positions, against all keys up to the tile's end
    decode rows     one query each, against its own keys rounded up to a bucket (`bucket_length`)

Rows that share a shape are computed in one call. Keys beyond a row's position are masked, and contribute exact zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.decoding.attention import TILE, LayerCall, StepInputs
from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.packed_rows import Chunk, PackedRows

MAX_GROUP_ROWS = 64  # bounds the memory of gathered keys and values
_QUERY_MULTIPLE = 4  # SDPA on a CPU sums in another order on threads whose scratch is not aligned to 16 bytes


def bucket_length(length: int) -> int:
    """The number of keys that a decode row of `length` keys is computed with: 64, 128, 192, 256, 384, 512, 768 …"""
    power = max(TILE, 1 << (length - 1).bit_length())
    three_quarters = power // 4 * 3
    return three_quarters if three_quarters % TILE == 0 and length <= three_quarters else power


def order(position: int) -> int:
    return bucket_length(position + 1)


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
class TiledBatch:
    """Masks are made once and shared by the layers that need the same."""

    cache: KVCache
    slots: Tensor
    """[T] where each row's key and value go."""
    chunks: Sequence[PromptChunk]
    groups: Sequence[DecodeGroup]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.write(call.layer, self.slots, key, value)
        num_rows, num_kv_heads = key.shape[:2]
        q = query.reshape(num_rows, num_kv_heads, -1, query.shape[2])  # [T, Hkv, G, D]
        sinks = None if call.sinks is None else call.sinks.view(num_kv_heads, -1).to(q.dtype)
        parts = [
            *self._decode_parts(call, q, sinks),
            *self._prompt_parts(call, q, sinks),
        ]  # in the order of the packed rows
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.flatten(1, 2)

    def _decode_parts(self, call: LayerCall, q: Tensor, sinks: Tensor | None) -> Iterator[Tensor]:
        """q [T, Hkv, G, D], sinks [Hkv, G]; one [num_rows, Hkv, G, Dv] for each decode group."""
        num_queries = q.shape[2]
        padding = -num_queries % _QUERY_MULTIPLE
        own_sinks = None if sinks is None else F.pad(sinks, (0, padding))[None, :, :, None]
        for number, group in enumerate(self.groups):
            keys, values = self.cache.read(call.layer, group.blocks)  # [B, L, Hkv, D]
            queries = q[group.first_row : group.first_row + group.num_rows]
            if padding:
                queries = F.pad(queries, (0, 0, 0, padding))
            mask = self._group_mask(number, keys.shape[1], q, call.window)
            result = _attend(call, queries, keys.transpose(1, 2), values.transpose(1, 2), mask, own_sinks)
            yield result[:, :, :num_queries] if padding else result

    def _prompt_parts(self, call: LayerCall, q: Tensor, sinks: Tensor | None) -> Iterator[Tensor]:
        """q [T, Hkv, G, D], sinks [Hkv, G]; one [num_rows, Hkv, G, Dv] for each tile of each prompt chunk."""
        num_queries = q.shape[2]
        own_sinks = None if sinks is None else sinks[:, :, None, None]
        for chunk in self.chunks:
            keys, values = self.cache.read(call.layer, chunk.blocks)  # [L, Hkv, D]
            for offset in range(0, chunk.num_rows, TILE):
                num_rows = min(TILE, chunk.num_rows - offset)
                first_row, end = chunk.first_row + offset, chunk.start + offset + TILE
                tile = q[first_row : first_row + num_rows]
                if num_rows < TILE:  # the last one of a prompt: computed at full size, as every other tile
                    tile = F.pad(tile, (0, 0, 0, 0, 0, 0, 0, TILE - num_rows))
                # heads in the batch dimension, groups in the head dimension: keys are shared without a copy
                seen_keys, seen_values = (
                    part[:end].transpose(0, 1)[:, None].expand(-1, num_queries, -1, -1)
                    for part in (keys, values)
                )
                mask = self._tile_mask(end - TILE, q, call.window)
                result = _attend(call, tile.permute(1, 2, 0, 3), seen_keys, seen_values, mask, own_sinks)
                yield result.permute(2, 0, 1, 3)[:num_rows]

    def _tile_mask(self, start: int, like: Tensor, window: int | None) -> Tensor:
        """[TILE, start + TILE] additive causal mask of the tile that begins at position `start`."""
        key = (-1, start, window)
        if key not in self._masks:
            queries = torch.arange(start, start + TILE, device=like.device)[:, None]
            keys = torch.arange(start + TILE, device=like.device)[None, :]
            self._masks[key] = _additive(_visible(queries, keys, window), like.dtype)
        return self._masks[key]

    def _group_mask(self, number: int, num_keys: int, like: Tensor, window: int | None) -> Tensor:
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


def _attend(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
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


def step_inputs(rows: PackedRows, kept: Sequence[int], cache: KVCache, device: torch.device) -> StepInputs:
    def as_tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    chunks = [_prompt_chunk(chunk, cache.block_size, device) for chunk in rows.chunks]
    groups = list(_decode_groups(rows, cache.block_size, device))
    batch = TiledBatch(cache, as_tensor(rows.slots), chunks, groups)
    return StepInputs(as_tensor(rows.token_ids), as_tensor(rows.positions), as_tensor(kept), batch)


def _prompt_chunk(chunk: Chunk, block_size: int, device: torch.device) -> PromptChunk:
    num_blocks = -(-(chunk.start + chunk.num_rows) // TILE) * TILE // block_size
    blocks = torch.tensor(_padded(chunk.block_table, num_blocks), device=device)
    return PromptChunk(chunk.first_row, chunk.num_rows, chunk.start, blocks)


def _decode_groups(rows: PackedRows, block_size: int, device: torch.device) -> Iterator[DecodeGroup]:
    """The decode rows lie in the order of `order`."""
    numbers = range(rows.num_decode_rows)
    for bucket, members in groupby(numbers, key=lambda row: order(rows.positions[row])):
        same_bucket = list(members)
        for start in range(0, len(same_bucket), MAX_GROUP_ROWS):
            part = same_bucket[start : start + MAX_GROUP_ROWS]
            tables = [_padded(rows.block_tables[row], bucket // block_size) for row in part]
            positions = [rows.positions[row] for row in part]
            yield DecodeGroup(
                part[0],
                len(part),
                torch.tensor(tables, device=device),
                torch.tensor(positions, device=device),
            )


def _padded(table: Sequence[int], length: int) -> list[int]:
    return [*table[:length], *[0] * (length - len(table))]
