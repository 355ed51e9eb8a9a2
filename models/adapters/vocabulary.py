"""How many tokens there are with those that an adapter adds, and that its weights have a row for each of them.

Knows the weights of the embedding and of the output layer by their shapes only.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cadenza.models.adapters.adapter import Change, EmbeddingChange, LinearChange, LowRank
from cadenza.models.adapters.arrays import as_array, transposed
from cadenza.models.adapters.layout import Layout
from cadenza.models.errors import ModelError


def fit_vocabulary(
    changes: Mapping[str, Change], layout: Layout, own_tokens: int, adapter_tokens: int | None
) -> tuple[dict[str, Change], int | None]:
    """(the changes, without rows that no token has; the number of tokens, None where none is added).

    own_tokens: in the model's tokenizer; adapter_tokens: in the adapter's, None where it brings none.
    """
    fitted = dict(changes)
    source, output = layout.input_embedding, layout.output_embedding or layout.input_embedding
    own_rows = {name: _own_rows(layout, name) for name in (source, output)}
    rows = {name: _rows(fitted.get(name), own_rows[name]) for name in own_rows}
    if adapter_tokens is None and rows != own_rows:
        adapter_tokens = max(rows.values())
    num_tokens = min(adapter_tokens or 0, max(rows.values()))
    for name in rows:
        if own_tokens < num_tokens > rows[name]:
            raise ModelError(
                f"the adapter adds tokens, {num_tokens} in all, and has {rows[name]} rows for them in {name}"
            )
        if name in fitted:
            fitted[name] = _first_rows(fitted[name], max(own_rows[name], num_tokens))
    _share(fitted, source, output)
    return fitted, num_tokens if num_tokens > own_tokens else None


def _own_rows(layout: Layout, name: str) -> int:
    site = layout.sites[name]
    return site.out_features if site.kind == "linear" else site.shapes["weight"][0]


def _rows(change: Change | None, own: int) -> int:
    weight = change.weight if isinstance(change, LinearChange | EmbeddingChange) else None
    return own if weight is None else weight.shape[0]


def _first_rows(change: Change, limit: int) -> Change:
    """Without what is for rows beyond: embeddings are often padded to a round number."""
    if not isinstance(change, LinearChange | EmbeddingChange) or _rows(change, limit) <= limit:
        return change
    pair = change.low_rank
    if isinstance(change, LinearChange):
        gain = None if change.gain is None else change.gain[:limit]
        bias = None if change.bias is None else change.bias[:limit]
        weight = None if change.weight is None else change.weight[:limit]
        low_rank = None if pair is None else LowRank(pair.a, pair.b[:limit])
        return replace(change, low_rank=low_rank, weight=weight, bias=bias, gain=gain)
    weight = None if change.weight is None else change.weight[:limit]
    low_rank = None if pair is None else LowRank(transposed(transposed(pair.a)[:limit]), pair.b)
    return replace(change, low_rank=low_rank, weight=weight)


def _share(changes: dict[str, Change], source: str, output: str) -> None:
    """Tied layers have the same weight twice in the file; it is held once."""
    first, second = changes.get(source), changes.get(output)
    if not isinstance(first, EmbeddingChange) or not isinstance(second, LinearChange):
        return
    if first.weight is None or second.weight is None or first.weight.shape != second.weight.shape:
        return
    if first.weight.dtype == second.weight.dtype and np.array_equal(
        as_array(first.weight), as_array(second.weight)
    ):
        changes[output] = replace(second, weight=first.weight)
