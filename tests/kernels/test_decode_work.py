"""What the planned items compute: every key that a row sees, once, and nothing else."""

import random

import numpy as np
import pytest
import torch

from cadenza.kernels.decode_work import SPLIT, TILE, DecodePlan, members_per_item, plan_decode


def check(plan: DecodePlan, tables: list[list[int]], positions: list[int], window: int | None = None) -> None:
    """Each row has all splits that it sees, one item and one partial result each, with the blocks of its table."""
    per_split = plan.blocks.shape[1]
    block_size = SPLIT // per_split
    wanted = {
        (row, split)
        for row, position in enumerate(positions)
        for split in range(position // SPLIT + 1)
        if window is None or (split + 1) * SPLIT > position - window + 1
    }
    found = [
        (int(row), int(split))
        for own, split in zip(plan.members, plan.splits, strict=True)
        for row in own
        if row >= 0
    ]
    assert sorted(found) == sorted(wanted)
    partials = sorted(int(plan.firsts[row]) + split for row, split in wanted)
    assert partials == list(range(plan.num_partials))
    for own, split, blocks in zip(plan.members, plan.splits, plan.blocks, strict=True):
        assert own[0] >= 0
        rows = own[own >= 0]
        for row in rows:
            is_full = positions[row] >= (split + 1) * SPLIT - 1
            assert is_full or len(rows) == 1
            seen = tables[row][
                split * per_split : min((split + 1) * per_split, positions[row] // block_size + 1)
            ]
            assert blocks.tolist() == seen + [0] * (per_split - len(seen))
    assert plan.positions.tolist() == positions
    assert all(array.dtype == np.int32 for array in plan.arrays)


def members_of(plan: DecodePlan) -> list[tuple[int, list[int]]]:
    return [
        (int(split), own[own >= 0].tolist()) for own, split in zip(plan.members, plan.splits, strict=True)
    ]


@pytest.mark.parametrize("group", [1, 3, 4, 32, 33])
def test_an_item_is_a_tile_of_queries(group):
    size = members_per_item(group)
    assert size >= 1
    assert size == 1 or size * group <= TILE < (size + 1) * group
    assert plan_decode([[7]], [3], 16, group).members.shape == (1, size)


@pytest.mark.parametrize("window", [None, 1, 255, 256, 257, 700])
@pytest.mark.parametrize("block_size", [1, 16, 64, 256])
def test_every_row_sees_all_its_keys(block_size, window):
    chooser = random.Random(block_size)
    positions = [0, 255, 256, 511, 512, -1, 1300, 767, 15, -1]
    ids = iter(chooser.sample(range(10_000), 6000))
    shared = [next(ids) for _ in range(512 // block_size)]
    tables = [
        (shared + [next(ids) for _ in range(position // block_size + 1)])[: position // block_size + 1]
        for position in positions
    ]
    tables[6] += [next(ids)] * 3  # reserved for later positions
    plan = plan_decode(tables, positions, block_size, 4, window=window)
    check(plan, tables, positions, window)
    assert plan.window == window


def test_forks_share_the_splits_of_their_prompt_and_have_their_own_tails():
    shared = list(range(100, 132))  # two splits
    tables = [[*shared, 1, 2], [*shared, 3], list(range(40, 74)), [*shared, 5]]
    positions = [540, 520, 530, 513]
    plan = plan_decode(tables, positions, 16, 4)
    check(plan, tables, positions)
    own_splits = [[0, 1, 3], [2]]
    assert sorted(members_of(plan)) == sorted(
        [(split, rows) for split in (0, 1) for rows in own_splits] + [(2, [row]) for row in range(4)]
    )
    assert sorted(plan.splits.tolist()) == plan.splits.tolist()


def test_more_sharers_than_members_take_several_items_next_to_each_other():
    tables = [[*range(16), 100 + row] for row in range(19)] + [[*range(16, 32), 200]] * 2
    positions = [256] * 21
    plan = plan_decode(tables, positions, 16, 4)
    check(plan, tables, positions)
    assert members_of(plan)[:4] == [
        (0, list(range(8))),
        (0, list(range(8, 16))),
        (0, [16, 17, 18]),
        (0, [19, 20]),
    ]


def test_two_groups_whose_tables_begin_alike_are_told_apart():
    tables = [[1, 2, 3, 10 + row % 2] for row in range(6)]
    plan = plan_decode(tables, [255] * 6, 64, 4)
    assert members_of(plan) == [(0, [0, 2, 4]), (0, [1, 3, 5])]


def test_equal_first_and_last_blocks_do_not_make_rows_share():
    """Tables that part and meet again, which no engine makes."""
    tables = [[1, 2, 3, 4], [1, 7, 3, 4], [1, 2, 3, 4]]
    positions = [255] * 3
    check(plan_decode(tables, positions, 64, 1), tables, positions)


def test_equal_blocks_of_different_splits_are_not_shared():
    tables = [[1, 2, 1, 2], [3, 4, 1, 2]]
    positions = [511, 511]
    plan = plan_decode(tables, positions, 128, 1)
    check(plan, tables, positions)
    assert members_of(plan) == [(0, [0]), (0, [1]), (1, [0, 1])]


def test_a_split_that_is_not_full_is_not_shared():
    plan = plan_decode([[1, 2, 3, 4]] * 5, [255, 254, 255, 254, 255], 64, 1)
    assert members_of(plan) == [(0, [1]), (0, [3]), (0, [0, 2, 4])]


def test_random_batches():
    chooser = random.Random(5)
    for _ in range(30):
        trunk = [chooser.sample(range(50), 40) for _ in range(2)]
        tables, positions = [], []
        for row in range(chooser.randint(0, 12)):
            position = chooser.choice([-1, chooser.randint(0, 600), 255, 256, 511])
            kept = chooser.randint(0, 40)
            tables.append(
                [*chooser.choice(trunk)[:kept], *(1000 * (row + 1) + number for number in range(40))]
            )
            positions.append(position)
        window = chooser.choice([None, 100, 300])
        check(plan_decode(tables, positions, 16, 4, window=window), tables, positions, window)


def test_tables_may_be_arrays():
    tables = [list(range(20)), [*range(16), 30, 31]]
    plan = plan_decode([np.array(table, np.int32) for table in tables], np.array([300, 280]), 16, 4)
    check(plan, tables, [300, 280])


def test_a_table_that_ends_too_early_is_refused():
    with pytest.raises(AssertionError):
        plan_decode([[1, 2]], [32], 16, 4)
    with pytest.raises(AssertionError):
        plan_decode([[1]], [3], 24, 4)


def test_it_comes_to_a_device_as_it_is():
    plan = plan_decode([[3, 4], []], [20, -1], 16, 4, window=9)
    work = plan.upload(torch.device("cpu"))
    for tensor, array in zip(
        (work.members, work.splits, work.blocks, work.positions, work.firsts), plan.arrays, strict=True
    ):
        assert tensor.numpy().tolist() == array.tolist()
    assert (work.num_partials, work.window) == (1, 9)


def test_nobody_is_no_work():
    plan = plan_decode([], [], 16, 4)
    assert plan.members.shape == (0, 8)
    assert plan.blocks.shape == (0, 16)
    assert plan.num_partials == 0
