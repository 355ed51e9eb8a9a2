"""Which decode rows are computed together on a GPU, as far as memory goes."""

import pytest

pytest.importorskip("triton")

from cadenza.decoding import fused_attention
from cadenza.kernels.decode_work import SPLIT


def test_rows_with_many_partial_results_are_computed_some_at_a_time(monkeypatch):
    monkeypatch.setattr(fused_attention, "MOST_PARTIALS", 10)
    positions = [0, 3 * SPLIT, 4 * SPLIT - 1, SPLIT - 1, 50 * SPLIT, 7, 5 * SPLIT, 5 * SPLIT]
    counts = [1, 4, 4, 1, 51, 1, 6, 6]
    parts = fused_attention._parts(positions)
    assert [counts[part] for part in parts] == [[1, 4, 4, 1], [51], [1, 6], [6]]
    assert [row for part in parts for row in range(*part.indices(len(positions)))] == list(
        range(len(positions))
    )


def test_no_rows_are_no_parts():
    assert fused_attention._parts([]) == []
