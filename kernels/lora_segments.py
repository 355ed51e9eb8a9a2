"""Which rows of a batch a GPU multiplies together: those that use the same planes of `kernels.lora`'s tables.

Made on the host, once a step for all layers of equal planes, and brought to the device in one copy that nothing waits
for. Knows nothing of the products (`kernels.lora_sgmv`), nor of Triton.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadenza.kernels.upload import upload

LANES = 16
"""Rows per tile: the least that tensor cores multiply at once."""


@dataclass(frozen=True, slots=True)
class Segments:
    """One step's uses of planes by rows, and the tiles of rows that use the same planes in the same order.

    Whatever decides a launch's grid is a shape, so that no launch waits for the device.
    """

    rows: Tensor
    """[n] int32 row of x and out of each use, ascending; a row's uses in the order in which they are summed."""
    planes: Tensor
    """[n] int32"""
    scales: Tensor
    """[n] float32"""
    firsts: Tensor
    """[tiles, 16] int32: of each lane, the first use of its row; -1: the lane is empty. Lane 0 never is."""
    lengths: Tensor
    """[tiles] int32: uses of each row of the tile."""
    pieces: Tensor
    """[n_pieces, 2] int32: (tile, k), the k-th uses of the rows of a tile, which are uses of one plane."""
    num_users: int
    """Rows that have uses."""
    num_planes: int
    """Planes that are used, each counted once."""


def segment(
    rows: NDArray[np.integer],
    planes: NDArray[np.integer],
    scales: NDArray[np.floating] | None,
    device: torch.device,
) -> Segments:
    """rows: [n], ascending; planes: [n]; scales: [n], None: all are 1. Nothing waits for the copy to the device."""
    n = len(rows)
    assert len(planes) == n
    assert bool(np.all(np.diff(rows) >= 0))
    starts = np.flatnonzero(np.diff(rows, prepend=-1)) if n else np.zeros(0, np.int64)
    lengths = np.diff(starts, append=n)
    group = _groups(starts, lengths, planes)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    tiles = -(-sizes // LANES)
    ordered = group[order]
    within = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[ordered]
    tile = (np.cumsum(tiles) - tiles)[ordered] + within // LANES
    firsts = np.full((int(tiles.sum()), LANES), -1, np.int32)
    firsts[tile, within % LANES] = starts[order]
    of_tiles = lengths[order][within % LANES == 0]
    pieces = np.stack((np.repeat(np.arange(len(of_tiles)), of_tiles), _counting(of_tiles)), axis=1)
    weights = np.ones(n, np.float32) if scales is None else np.asarray(scales, np.float32)
    integers = [array.astype(np.int32) for array in (rows, planes, firsts, of_tiles, pieces)]
    parts = upload([*integers, weights], device)
    return Segments(
        rows=parts[0],
        planes=parts[1],
        scales=parts[5],
        firsts=parts[2],
        lengths=parts[3],
        pieces=parts[4],
        num_users=len(starts),
        num_planes=len(np.unique(planes)),
    )


def _groups(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], planes: NDArray[np.integer]
) -> NDArray[np.int64]:
    """[users] a number for each row, the same for rows with the same list of planes."""
    lists = np.full((len(starts), int(lengths.max(initial=1))), -1, np.int64)
    lists[np.repeat(np.arange(len(starts)), lengths), _counting(lengths)] = planes
    # Rows of a prompt come one after another, so that few lists need be looked up one by one.
    is_new = np.ones(len(starts), bool)
    is_new[1:] = (lists[1:] != lists[:-1]).any(axis=1)
    numbers: dict[bytes, int] = {}
    of_runs = [numbers.setdefault(own.tobytes(), len(numbers)) for own in lists[is_new]]
    result: NDArray[np.int64] = np.array(of_runs, np.int64)[np.cumsum(is_new) - 1]
    return result


def _counting(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … within each length."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
