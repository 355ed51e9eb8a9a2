"""Whose adapters each row of one step is computed with, in the forms that layers ask for. Rebuilt for every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cadenza.decoding.adapters.set import AdapterSet
from cadenza.kernels import lora, ops
from cadenza.kernels.lora import Uses
from cadenza.kernels.lora_segments import Segments, segment
from cadenza.kernels.upload import upload
from cadenza.models.adapters.adapter import Adapter

Planes = tuple[int, ...]
"""Of one layer: how many planes each slot has there, 0 where its adapter changes nothing. Layers of equal planes share
what is made of a batch."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One adapter of a set: where it is, and how strong."""

    slot: int
    scale: float


@dataclass(slots=True)
class RowsOfSets:
    """The rows that one kind of layer is given: which set each belongs to."""

    owner: np.ndarray
    """[T] number of the set, -1: none."""
    sets: Sequence[Sequence[Placed]]
    planes_per_slot: int
    device: torch.device
    _uses: dict[Planes, Uses | Segments | None] = field(default_factory=dict)
    _gathered: tuple[Tensor, Uses, Tensor] | None = None
    _rows: dict[int, Tensor] = field(default_factory=dict)

    def rows_of(self, number: int) -> Tensor:
        """[rows] int64: those of the set."""
        if number not in self._rows:
            (self._rows[number],) = upload([np.flatnonzero(self.owner == number)], self.device)
        return self._rows[number]

    def add_low_rank_(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor, planes: Planes) -> None:
        """Add to each row of out [T, out_features] what its set's planes of the tables a and b make of its row of x
        [..., in_features]. planes: how many each slot has there."""
        if planes not in self._uses:
            self._uses[planes] = self._make_uses(planes)
        uses = self._uses[planes]
        if isinstance(uses, Uses):
            if lora.is_large(uses, x.shape[-1]):
                y = lora.shrink_large(x.reshape(-1, x.shape[-1]), a, uses)
            else:
                y = lora.shrink(self._rows_as_used(x, uses), a, uses)
            lora.expand_(out, y, b, uses)
        elif uses is not None:
            from cadenza.kernels import lora_sgmv  # Triton is only there where a GPU may be

            flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
            lora_sgmv.expand_(out, lora_sgmv.shrink(flat, a, uses), b, uses)

    def _rows_as_used(self, x: Tensor, uses: Uses) -> Tensor:
        """Once for all layers that are given the same tensor, one after the other."""
        known = self._gathered
        if known is None or known[0] is not x or known[1] is not uses:
            rows = lora.gather(x.reshape(-1, x.shape[-1]), uses)
            known = self._gathered = (x, uses, rows)
        return known[2]

    def _make_uses(self, planes: Planes) -> Uses | Segments | None:
        per_set = [
            [
                (placed.slot * self.planes_per_slot + plane, placed.scale)
                for placed in own
                for plane in range(planes[placed.slot])
            ]
            for own in self.sets
        ]
        counts = np.array([*(len(own) for own in per_set), 0])[self.owner]  # owner -1 finds the last, 0
        users = np.flatnonzero(counts)
        if not len(users):
            return None
        own_planes = [np.array([plane for plane, _ in own], np.int64) for own in per_set]
        all_planes = np.concatenate([own_planes[number] for number in self.owner[users]])
        scales = None
        if any(scale != 1.0 for own in per_set for _, scale in own):
            own_scales = [np.array([scale for _, scale in own], np.float32) for own in per_set]
            scales = np.concatenate([own_scales[number] for number in self.owner[users]])
        rows = np.repeat(users, counts[users])
        if ops.runs_triton(self.device):
            return segment(rows, all_planes, scales, self.device)
        starts = np.cumsum(counts[users]) - counts[users]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        return Uses(
            rows=tensor(rows),
            planes=tensor(all_planes),
            scales=None if scales is None else tensor(scales),
            users=tensor(users),
            starts=tensor(starts),
            num_rows=len(self.owner),
        )


@dataclass(slots=True)
class AdapterBatch:
    """One step's rows, and those among them whose logits are wanted, which are all that the output layer gets."""

    every: RowsOfSets
    kept: RowsOfSets
    token_ids: Tensor
    """[T] of every row."""
    num_tokens: int | None
    """The largest vocabulary among the sets, where adapters have added tokens."""


def batch_of(
    owners: Sequence[AdapterSet | None],
    kept: Sequence[int] | None,
    token_ids: Tensor,
    slot_of: Callable[[Adapter], int],
    planes_per_slot: int,
    device: torch.device,
) -> AdapterBatch | None:
    """owners: of each row; kept: the rows that the output layer is given, None: all; slot_of: of an adapter. Returns
    None where no row has an adapter."""
    sets: dict[str, int] = {}
    by_key: list[AdapterSet] = []
    numbers = np.full(len(owners), -1, np.int64)
    seen: dict[int, int] = {}
    for row, own in enumerate(owners):
        if own is None or not own.terms:
            continue
        number = seen.get(id(own))
        if number is None:
            number = seen[id(own)] = sets.setdefault(own.key, len(sets))
            if number == len(by_key):
                by_key.append(own)
        numbers[row] = number
    if not by_key:
        return None
    placed = [[Placed(slot_of(term.adapter), term.scale) for term in own.terms] for own in by_key]
    every = RowsOfSets(numbers, placed, planes_per_slot, device)
    own_rows = every if kept is None else RowsOfSets(numbers[list(kept)], placed, planes_per_slot, device)
    num_tokens = max((own.num_tokens for own in by_key if own.num_tokens), default=None)
    return AdapterBatch(every, own_rows, token_ids, num_tokens)
