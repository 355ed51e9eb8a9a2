"""Attention on a GPU, by `kernels`: one fills the cache, one is for prompts, one for decode rows.

Decode rows that read the same blocks, as branches of one request and requests with one system prompt do, have them read
once (`kernels.decode_work`). A row's result is made of the same operations whatever is beside it. What a step needs on
the device comes there in one copy that nothing waits for, and the forward pass reads nothing else: it could be a graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadenza.decoding.attention import LayerCall, StepInputs
from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.packed_rows import PackedRows
from cadenza.kernels.decode_attention import decode_attention
from cadenza.kernels.decode_work import SPLIT, DecodeWork, plan_decode
from cadenza.kernels.kv_write import write_kv
from cadenza.kernels.prefill_attention import prefill_attention
from cadenza.kernels.prefill_work import PrefillWork, plan_prefill
from cadenza.kernels.upload import upload

MOST_PARTIALS = 2**15
"""Of a launch of decode attention: 512 MB of partial results for 32 heads of 128. A preempted long answer that is
computed again may have hundreds of thousands."""

order = None
"""Decode rows stay as they come: `tiled_attention` sorts them by length, and whoever packs rows asks either."""


@dataclass(frozen=True, slots=True)
class FusedBatch:
    cache: KVCache
    slots: Tensor
    """[T] where each row's key and value go."""
    num_decode_rows: int
    """The first ones; the others are prompts'."""
    decode: Mapping[int, Sequence[DecodeWork]]
    """By the number of query heads per key head, which layers may differ in: the decode rows, some at a time."""
    prefill: PrefillWork

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.keys[call.layer], self.cache.values[call.layer]
        query, key, value = (part.to(keys.dtype) for part in (query, key, value))  # some rotate in float32
        write_kv(keys, values, self.slots, key, value)
        options: dict[str, Any] = {
            "scale": call.scale,
            "window": call.window,
            "softcap": call.softcap,
            "sinks": call.sinks,
        }
        num_heads, first = query.shape[1], self.num_decode_rows
        out = torch.empty(len(query), num_heads, value.shape[2], dtype=query.dtype, device=query.device)
        start = 0
        for work in self.decode[num_heads // key.shape[1]]:
            own = slice(start, start + len(work.positions))
            decode_attention(query[own], keys, values, work, **options, out=out[own])
            start = own.stop
        if first < len(query):
            prefill_attention(query[first:], keys, values, self.prefill, **options, out=out[first:])
        return out


def step_inputs(rows: PackedRows, kept: Sequence[int], cache: KVCache, device: torch.device) -> StepInputs:
    first = rows.num_decode_rows
    parts = _parts(rows.positions[:first])
    decode = {
        group: [
            plan_decode(rows.block_tables[part], rows.positions[part], cache.block_size, group)
            for part in parts
        ]
        for group in cache.group_sizes
    }
    prefill = plan_prefill(
        [chunk.block_table for chunk in rows.chunks],
        [chunk.start for chunk in rows.chunks],
        [chunk.first_row - first for chunk in rows.chunks],
        [chunk.num_rows for chunk in rows.chunks],
        cache.block_size,
    )
    numbers = [np.array(values, np.int64) for values in (rows.token_ids, rows.positions, kept, rows.slots)]
    planned = [array for plans in decode.values() for plan in plans for array in plan.arrays]
    tensors = iter(upload([*numbers, *planned, *prefill], device))
    token_ids, positions, kept_rows, slots = islice(tensors, len(numbers))
    work = {
        group: [plan.on_device(list(islice(tensors, len(plan.arrays)))) for plan in plans]
        for group, plans in decode.items()
    }
    batch = FusedBatch(cache, slots, first, work, PrefillWork(*tensors))
    return StepInputs(token_ids, positions, kept_rows, batch)


def _parts(positions: Sequence[int]) -> list[slice]:
    """Decode rows whose partial results are computed together, in order."""
    parts, start, num_partials = [], 0, 0
    for row, position in enumerate(positions):
        own = position // SPLIT + 1
        if row > start and num_partials + own > MOST_PARTIALS:
            parts.append(slice(start, row))
            start, num_partials = row, 0
        num_partials += own
    return [*parts, slice(start, len(positions))] if positions else []
