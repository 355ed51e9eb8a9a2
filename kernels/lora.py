"""Low-rank changes of many adapters at once: `y += scale · (x Aᵀ) Bᵀ`, another A and B for every row of the batch.

Adapters lie in tables of planes of 16 ranks, A as [planes · in_features, 16] and B as [planes · 16, out_features]; an
adapter of rank r has ceil(r / 16) planes, padded with zeros, and its scaling is in B. A step is a list of uses, each of
one plane by one row. On a CPU both products are bags of table rows, weighted by x and by the shrunk x: what
`embedding_bag` was made for. It gathers nothing into memory, costs the same whatever the mix, and sums every row by
itself in one order, so that a row does not depend on the batch.

The idea of computing many adapters beside one shared product is Punica's (Chen et al. 2023) and S-LoRA's (Sheng et al.
2023). Knows nothing of adapters' names, slots or layers.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PLANE = 16
"""Ranks per plane: one vector register of float32, one line of the cache."""

_AT_ONCE = 2**23
"""Elements of x that are gathered, and looked up, together: beyond, it is done in pieces."""


def num_planes(rank: int) -> int:
    return -(-rank // PLANE)


@dataclass(slots=True)
class Uses:
    """Which rows of a batch use which planes, sorted by row; a row's uses in the order in which they are summed."""

    rows: Tensor
    """[n] int64 rows of x."""
    planes: Tensor
    """[n] int64"""
    scales: Tensor | None
    """[n] float32; None: all are 1."""
    users: Tensor
    """[m] int64 the rows that have uses, each once."""
    starts: Tensor
    """[m] int64 where each of them begins among the uses."""
    num_rows: int
    """Of the batch."""
    _in_table: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _of_planes: tuple[Tensor, Tensor] | None = None

    @property
    def is_one_each(self) -> bool:
        """Every row of the batch has exactly one use."""
        return len(self.rows) == len(self.users) == self.num_rows

    def in_table(self, in_features: int) -> tuple[Tensor, Tensor]:
        """(rows of A's table, where each use begins among them), int32: every plane's in_features rows."""
        if in_features not in self._in_table:
            self._in_table[in_features] = _rows_of_planes(self.planes, in_features)
        return self._in_table[in_features]

    def of_planes(self) -> tuple[Tensor, Tensor]:
        """(rows of B's table, where each user begins among them), int32: every plane's 16 rows."""
        if self._of_planes is None:
            within = torch.arange(PLANE, dtype=torch.int32, device=self.planes.device)
            first = self.planes.to(torch.int32) * PLANE
            self._of_planes = ((first[:, None] + within).view(-1), self.starts.to(torch.int32) * PLANE)
        return self._of_planes


def _rows_of_planes(planes: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    within = torch.arange(in_features, dtype=torch.int32, device=planes.device)
    first = planes.to(torch.int32) * in_features
    starts = torch.arange(len(planes), dtype=torch.int32, device=planes.device) * in_features
    return (first[:, None] + within).view(-1), starts


def is_large(uses: Uses, in_features: int) -> bool:
    """Whether rows and indices of all uses at once would take much memory, as those of long prompts do."""
    return len(uses.rows) * in_features > _AT_ONCE


def gather(x: Tensor, uses: Uses) -> Tensor:
    """x [T, in_features] row by row as the uses want it: [n, in_features], contiguous."""
    return x.contiguous() if uses.is_one_each else x.index_select(0, uses.rows)


def shrink(gathered: Tensor, a: Tensor, uses: Uses) -> Tensor:
    """[n, 16]: each use's row times its plane of A, scaled. gathered: `gather`'s; all of the table's dtype."""
    indices, starts = uses.in_table(gathered.shape[1])
    return _scaled(_bags(a, indices, starts, gathered.view(-1)), uses)


def shrink_large(x: Tensor, a: Tensor, uses: Uses) -> Tensor:
    """The same to the last bit, of x [T, in_features] itself, some uses at a time."""
    in_features = x.shape[1]
    parts = []
    pieces = max(1, _AT_ONCE // in_features)
    for rows, planes in zip(uses.rows.split(pieces), uses.planes.split(pieces), strict=True):
        indices, starts = _rows_of_planes(planes, in_features)
        parts.append(_bags(a, indices, starts, x.index_select(0, rows).view(-1)))
    return _scaled(torch.cat(parts), uses)


def _scaled(y: Tensor, uses: Uses) -> Tensor:
    return y if uses.scales is None else y * uses.scales[:, None].to(y.dtype)


def expand_(out: Tensor, y: Tensor, b: Tensor, uses: Uses) -> None:
    """Add each use's y times its plane of B to its row of out [T, out_features], in place."""
    indices, starts = uses.of_planes()
    change = _bags(b, indices, starts, y.view(-1)).to(out.dtype)
    if len(uses.users) == uses.num_rows:
        out.add_(change)
    else:
        out.index_add_(0, uses.users, change)


def _bags(table: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """[bags, width]: weighted sums of table rows."""
    result: Tensor = torch.ops.aten._embedding_bag_forward_only(
        table, indices, starts, False, 0, False, weights
    )[0]
    return result
