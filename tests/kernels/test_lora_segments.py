import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.kernels.lora_segments import LANES, Segments, segment

CPU = torch.device("cpu")

steps = st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=60)
"""Of each row: the planes it uses. So few that many rows have the same list."""


def of_step(step: list[list[int]]) -> Segments:
    rows = np.array([row for row, own in enumerate(step) for _ in own], np.int64)
    planes = np.array([plane for own in step for plane in own], np.int64)
    return segment(rows, planes, np.arange(len(rows)) / 4, CPU)


@given(steps)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_use_is_in_one_piece_of_its_plane_and_lanes_go_through_their_rows_uses_in_order(step):
    segments = of_step(step)
    found: dict[int, list[tuple[int, float]]] = {}
    for tile, (lanes, length) in enumerate(zip(segments.firsts, segments.lengths.tolist(), strict=True)):
        assert [piece[1] for piece in segments.pieces.tolist() if piece[0] == tile] == list(range(length))
        for first in lanes[lanes >= 0].tolist():
            own = slice(first, first + length)
            assert segments.planes[own].tolist() == segments.planes[lanes[0] : lanes[0] + length].tolist()
            (row,) = set(segments.rows[own].tolist())
            assert row not in found
            found[row] = segments.planes[own].tolist()
    assert found == {row: own for row, own in enumerate(step) if own}
    assert segments.scales.tolist() == [use / 4 for use in range(len(segments.rows))]


@given(steps)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_there_are_as_few_tiles_as_lists_of_planes_allow(step):
    segments = of_step(step)
    used = [tuple(own) for own in step if own]
    assert len(segments.firsts) == sum(-(-used.count(own) // LANES) for own in set(used))
    assert len(segments.pieces) == int(segments.lengths.sum())
    assert (segments.num_users, segments.num_planes) == (
        len(used),
        len({plane for own in used for plane in own}),
    )


def test_rows_of_different_requests_and_strengths_share_a_tile():
    segments = segment(np.array([1, 4, 9]), np.array([7, 7, 7]), np.array([1.0, -0.5, 2.0]), CPU)
    assert segments.firsts.tolist() == [[0, 1, 2] + [-1] * 13]
    assert segments.scales.tolist() == [1.0, -0.5, 2.0]


def test_kernels_are_compiled_for_one_alignment_whatever_the_batch():
    for n in (1, 2, 3, 5, 16, 17):
        segments = segment(np.arange(n), np.zeros(n, np.int64), None, CPU)
        tensors = (
            segments.rows,
            segments.planes,
            segments.scales,
            segments.firsts,
            segments.lengths,
            segments.pieces,
        )
        assert {tensor.storage_offset() % 4 for tensor in tensors} == {0}
        assert all(tensor.is_contiguous() for tensor in tensors)
