"""The plan of a step's prompts."""

import numpy as np
import pytest
import torch

from cadenza.kernels.prefill_work import PrefillWork, plan_prefill


def test_tiles_cover_every_chunk_and_those_with_the_most_keys_come_first():
    plan = plan_prefill(
        [[7, 8], [1, 2, 3, 4, 5, 6, 9, 10, 11], [20] * 40], [0, 64, 128], [5, 6, 80], [1, 70, 64], 16
    )
    assert plan.tiles.tolist() == [[1, 1], [2, 0], [1, 0], [0, 0]]
    assert plan.starts.tolist() == [0, 64, 128]
    assert plan.first_rows.tolist() == [5, 6, 80]
    assert plan.num_rows.tolist() == [1, 70, 64]


def test_tables_hold_the_blocks_up_to_the_end_and_nothing_else():
    plan = plan_prefill([[7, 8, 9], [1, 2, 3, 4, 5, 6]], [0, 64], [0, 17], [17, 1], 16)
    assert plan.block_tables.tolist() == [[7, 8, 0, 0, 0], [1, 2, 3, 4, 5]]


def test_a_chunk_without_rows_has_no_tiles_and_no_chunks_no_plan():
    assert plan_prefill([[1, 2, 3, 4], [5]], [64, 0], [3, 3], [0, 1], 16).tiles.tolist() == [[1, 0]]
    empty = plan_prefill([], [], [], [], 16)
    assert empty.tiles.shape == (0, 2)
    assert empty.block_tables.shape == (0, 0)
    work = PrefillWork.of(empty, torch.device("cpu"))
    assert work.tiles.shape == (0, 2)


def test_everything_is_int32_and_reaches_the_device_as_it_is():
    plan = plan_prefill([[7, 8], [1]], [0, 0], [0, 20], [20, 3], 16)
    assert {part.dtype for part in plan} == {np.dtype(np.int32)}
    work = PrefillWork.of(plan, torch.device("cpu"))
    for array, name in zip(plan, plan._fields, strict=True):
        assert getattr(work, name).tolist() == array.tolist()


def test_chunks_begin_at_tiles_and_have_their_blocks():
    with pytest.raises(AssertionError):
        plan_prefill([[1, 2, 3]], [16], [0], [3], 16)
    with pytest.raises(AssertionError, match="5 blocks are needed, 4 are there"):
        plan_prefill([[1, 2, 3, 4]], [64], [0], [3], 16)
