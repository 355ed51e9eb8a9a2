"""Which tiles of queries a GPU's prefill attention computes, planned on the host once a step for all layers.

Prompts come in chunks of consecutive tokens, which begin at multiples of `TILE`; so every tile stands at an absolute
multiple of `TILE` in its prompt, however the prompt was cut. Knows nothing of heads, nor of Triton
(`kernels.prefill_attention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadenza.kernels.upload import upload

TILE = 64
"""Positions of queries in a tile."""


class PrefillPlan(NamedTuple):
    """One step's C chunks, all int32. Ready for `upload`, in the order of `PrefillWork`'s fields."""

    block_tables: NDArray[np.int32]
    """[C, blocks] the blocks of each chunk's prompt up to the chunk's end, padded with 0."""
    starts: NDArray[np.int32]
    """[C] position of the first token, a multiple of `TILE`: so many tokens stand in the cache already."""
    first_rows: NDArray[np.int32]
    """[C] the first token's row among the packed rows."""
    num_rows: NDArray[np.int32]
    """[C] tokens."""
    tiles: NDArray[np.int32]
    """[n, 2] (chunk, number of the tile within the chunk), those with the most keys first: long programs that began
    last would keep the GPU waiting."""


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A `PrefillPlan` on the device. What decides a launch's grid is a shape: no launch waits for the device."""

    block_tables: Tensor
    starts: Tensor
    first_rows: Tensor
    num_rows: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, plan: PrefillPlan, device: torch.device) -> "PrefillWork":
        """In one copy that nothing waits for."""
        return cls(*upload(plan, device))


def plan_prefill(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    first_rows: Sequence[int],
    num_rows: Sequence[int],
    block_size: int,
) -> PrefillPlan:
    """One entry of each argument for each chunk; block tables may be longer than needed, and their ends are cut off."""
    assert len(block_tables) == len(starts) == len(first_rows) == len(num_rows)
    assert all(start % TILE == 0 for start in starts)
    ends = [start + count for start, count in zip(starts, num_rows, strict=True)]
    num_blocks = [-(-end // block_size) for end in ends]
    tables = np.zeros((len(ends), max(num_blocks, default=0)), np.int32)
    for row, table, needed in zip(tables, block_tables, num_blocks, strict=True):
        assert len(table) >= needed, f"{needed} blocks are needed, {len(table)} are there"
        row[:needed] = table[:needed]
    counts = -(-np.asarray(num_rows, np.int64) // TILE)
    chunk = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(chunk)) - (np.cumsum(counts) - counts)[chunk]
    first_positions = np.asarray(starts, np.int64)[chunk] + number * TILE
    order = np.argsort(-first_positions, kind="stable")
    return PrefillPlan(
        tables,
        np.asarray(starts, np.int32),
        np.asarray(first_rows, np.int32),
        np.asarray(num_rows, np.int32),
        np.stack((chunk, number), axis=1)[order].astype(np.int32),
    )
