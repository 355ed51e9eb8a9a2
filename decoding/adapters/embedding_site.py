"""The hook on an embedding: rows of each set looked up in the tables of its adapters.

Knows one embedding. What is looked up for a row never depends on the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadenza.decoding.adapters.sites import Batch, weighted
from cadenza.models.adapters.adapter import Change, EmbeddingChange
from cadenza.models.adapters.layout import Site


@dataclass(frozen=True, slots=True)
class _Table:
    change: EmbeddingChange
    size: int
    """Rows: an id beyond them is a token that another adapter of the set has added."""
    a: Tensor | None
    """[tokens, rank]"""
    b: Tensor | None
    """[rank, embedding_dim]"""
    row_of: Tensor | None
    """[tokens] where `rows` has the token's row, -1: nowhere."""


class EmbeddingHook:
    """A token that only adapters know has a row of zeros in the model's own table, and in theirs who do not know it."""

    def __init__(
        self, site: Site, batch: Batch, dtype: torch.dtype, device: torch.device, *, is_input: bool
    ) -> None:
        """is_input: it is given the tokens; otherwise what it is given are rows of its own table, as positions are."""
        self._num_rows, self._batch, self._is_input = site.shapes["weight"][0], batch, is_input
        self._dtype, self._device = dtype, device
        self._tables: dict[int, _Table] = {}

    def put(self, slot: int, change: Change) -> None:
        assert isinstance(change, EmbeddingChange)
        a = b = row_of = None
        size = self._num_rows if change.weight is None else len(change.weight)
        if change.low_rank is not None:
            a = change.low_rank.a.T.to(self._device, self._dtype).contiguous()
            b = change.low_rank.b.T.to(self._device, self._dtype).contiguous()
        if change.rows is not None:
            ids, values = change.rows
            size = max(size, int(ids.max()) + 1)
            row_of = torch.full((size,), -1, dtype=torch.int64)
            row_of[ids] = torch.arange(len(ids))
            row_of = row_of.to(self._device)
            change = EmbeddingChange(
                change.low_rank, change.gain, change.weight, (ids, values.to(self._device, self._dtype))
            )
        self._tables[slot] = _Table(change, size, a, b, row_of)

    def clear(self, slot: int) -> None:
        self._tables.pop(slot, None)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """A pre-hook: tokens that only adapters know must not be looked up in the model's own table."""
        batch = self._batch()
        if batch is None or batch.num_tokens is None or not self._is_input:
            return None
        return (args[0].clamp(max=self._num_rows - 1), *args[1:])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        batch = self._batch()
        if batch is None or not self._tables:
            return None
        rows = batch.every
        ids = batch.token_ids if self._is_input else args[0].reshape(-1)
        out = output.view(-1, output.shape[-1])
        embed_scale = getattr(module, "embed_scale", None)
        for number, own in enumerate(rows.sets):
            if not any(placed.slot in self._tables for placed in own):
                continue
            at = rows.rows_of(number)
            own_ids = ids[at]
            before = out[at].masked_fill((own_ids >= self._num_rows)[:, None], 0)
            changes = [
                (placed.scale, self._changed(self._tables[placed.slot], own_ids, before, embed_scale))
                for placed in own
                if placed.slot in self._tables
            ]
            out[at] = weighted(before, changes)
        return None

    def _changed(self, table: _Table, ids: Tensor, before: Tensor, embed_scale: Any) -> Tensor:
        """[n, embedding_dim]; embed_scale: what the module multiplies what it looks up with."""
        change, after = table.change, before
        is_known = ids < table.size
        ids = ids.clamp(max=table.size - 1)

        def scaled(values: Tensor) -> Tensor:
            values = values.to(self._device, self._dtype)
            return values if embed_scale is None else values * torch.as_tensor(embed_scale).to(values)

        if change.weight is not None:
            after = scaled(change.weight[ids.cpu()])
        if change.gain is not None:
            after = after * (1 + change.gain.to(self._device, self._dtype))
        if table.a is not None and table.b is not None:
            after = after + scaled(_bags(table.a[ids], table.b))
        if table.row_of is not None and change.rows is not None:
            found = table.row_of[ids]
            values = scaled(change.rows[1][found.clamp(min=0)])
            after = torch.where((found >= 0)[:, None], values, after)
        return torch.where(is_known[:, None], after, before)


def _bags(weights: Tensor, b: Tensor) -> Tensor:
    """weights [n, rank] @ b [rank, embedding_dim], one bag of b's rows for each token: a token's sum does not depend on
    the others."""
    count, rank = weights.shape
    return F.embedding_bag(
        torch.arange(rank, device=b.device).repeat(count),
        b,
        torch.arange(count, device=b.device) * rank,
        mode="sum",
        per_sample_weights=weights.reshape(-1),
    )
