"""Which rows of a step read which keys together in `kernels.decode_attention`, planned on the host in NumPy.

Keys are cut at fixed multiples of SPLIT positions, whatever the batch, and one item of work is one split of up to
`members_per_item` rows. Several rows share an item where the split is full, that is, each of them sees all of its
positions, and all its block ids are equal: forks and beams of one prompt, drafts of one branch, and requests that share
a cached prompt. This is the grouping of Hydragen (Juravsky et al. 2024) and of FlashInfer's cascades (Ye et al. 2025),
found split by split instead of as a tree.

A split that is not full is never shared, although the kernel masks each row by its own position: so no number beyond a
row's position, not even a NaN, can reach the row. Its blocks still come from memory once where several rows read them,
because items of the same blocks follow one another.

Knows nothing of heads' sizes, layers or Triton. A plan holds for all layers whose groups of queries and whose block
tables are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadenza.kernels.upload import upload

SPLIT = 256
"""Positions per split. It decides in which order a row's keys are summed, so another number gives other bits."""

TILE = 32
"""Queries, members times heads of a group, that a program computes at once: what a tensor core multiplies without being
the bound, at 8 rows of Llama's 4 heads per key head."""


def members_per_item(group: int) -> int:
    """The most rows of an item. group: query heads per key head."""
    return max(1, TILE // group)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A step's plan on the device. What decides a launch's grid is a shape or a number of the host."""

    members: Tensor
    """[items, members_per_item] int32 rows; -1: empty. An item all of whose members are empty does nothing."""
    splits: Tensor
    """[items] int32: an item's keys are those of positions SPLIT · split to SPLIT · (split + 1) - 1."""
    blocks: Tensor
    """[items, SPLIT / block_size] int32 ids of the blocks of these positions; 0 for those that no member sees."""
    positions: Tensor
    """[R] int32 of the rows' queries; -1: the row is padding, its result is 0."""
    firsts: Tensor
    """[R] int32: a row's result over split s is partial firsts[row] + s. Below 0 where its first splits are unseen."""
    num_partials: int
    window: int | None
    """The widest window that the plan suffices for; None: any."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """`DecodeWork` on the host."""

    members: NDArray[np.int32]
    splits: NDArray[np.int32]
    blocks: NDArray[np.int32]
    positions: NDArray[np.int32]
    firsts: NDArray[np.int32]
    num_partials: int
    window: int | None

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """What the device needs, for an upload together with a step's other arrays."""
        return self.members, self.splits, self.blocks, self.positions, self.firsts

    def on_device(self, arrays: Sequence[Tensor]) -> DecodeWork:
        """arrays: `self.arrays`, uploaded."""
        members, splits, blocks, positions, firsts = arrays
        return DecodeWork(
            members, splits, blocks, positions, firsts, num_partials=self.num_partials, window=self.window
        )

    def upload(self, device: torch.device) -> DecodeWork:
        """Nothing waits for the copy."""
        return self.on_device(upload(self.arrays, device))


def plan_decode(
    block_tables: Sequence[Sequence[int]],
    positions: Sequence[int] | NDArray[np.integer],
    block_size: int,
    group: int,
    *,
    window: int | None = None,
) -> DecodePlan:
    """block_tables: of each row, ids of the blocks of positions 0, block_size, …, at least to the row's position.
    positions: [R], -1 for rows that are padding. group: query heads per key head.

    window: of the layers that this is for; splits before it are then no work. A plan without one does for them too:
    their programs find nothing to do.
    """
    assert SPLIT % block_size == 0, f"blocks of {block_size} positions do not divide splits of {SPLIT}"
    assert len(block_tables) == len(positions)
    position = np.asarray(positions, np.int64)
    ends = position // SPLIT + 1
    begins = np.zeros_like(ends) if window is None else np.maximum(position - window + 1, 0) // SPLIT
    begins = np.minimum(begins, ends)
    counts = ends - begins
    firsts = np.cumsum(counts) - counts - begins
    row = np.repeat(np.arange(len(position)), counts)
    split = np.arange(len(row)) - firsts[row]
    blocks = _blocks_of(block_tables, position, block_size, begins, counts)

    # Equal splits come to lie side by side: tables that part never meet again, so the last blocks tell them apart.
    # Where tables do otherwise, less is shared than could be.
    is_full = position[row] >= (split + 1) * SPLIT - 1
    order = np.lexsort((row, is_full, blocks[:, 0], blocks[:, -1], split))
    row, split, blocks, is_full = row[order], split[order], blocks[order], is_full[order]
    is_shared = np.zeros(len(row), bool)  # with the one before
    is_shared[1:] = (split[1:] == split[:-1]) & is_full[1:] & is_full[:-1]
    is_shared[1:] &= (blocks[1:] == blocks[:-1]).all(axis=1)
    place = np.arange(len(row))
    size = members_per_item(group)
    lane = (place - np.maximum.accumulate(np.where(is_shared, 0, place))) % size
    starts = np.flatnonzero(lane == 0)
    members = np.full((len(starts), size), -1, np.int32)
    members[np.cumsum(lane == 0) - 1, lane] = row
    return DecodePlan(
        members=members,
        splits=split[starts].astype(np.int32),
        blocks=blocks[starts],
        positions=position.astype(np.int32),
        firsts=firsts.astype(np.int32),
        num_partials=len(row),
        window=window,
    )


def _blocks_of(
    block_tables: Sequence[Sequence[int]],
    position: NDArray[np.int64],
    block_size: int,
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> NDArray[np.int32]:
    """[sum of counts, SPLIT / block_size] block ids of each row's splits from `begins`, padded with 0."""
    per_split = SPLIT // block_size
    blocks = np.zeros(int(counts.sum()) * per_split, np.int32)
    first = begins * per_split
    lengths = position // block_size + 1 - first
    lengths[counts == 0] = 0
    slices = zip(block_tables, first.tolist(), (first + lengths).tolist(), strict=True)
    ids = np.fromiter(chain.from_iterable(table[start:end] for table, start, end in slices), np.int32)
    assert len(ids) == lengths.sum(), "a block table ends before its row's position"
    skipped = (np.cumsum(counts) - counts) * per_split - (np.cumsum(lengths) - lengths)
    blocks[np.arange(len(ids)) + np.repeat(skipped, lengths)] = ids
    return blocks.reshape(-1, per_split)
