"""Blocks and rows for drafts: only what nobody else has taken, and back when the step is over."""

import random
from collections.abc import Callable

import pytest

from cadenza.decoding.block_pool import BlockPool
from cadenza.decoding.branch import Branch
from cadenza.decoding.scheduler import Scheduler

BLOCK = 16
NewBranch = Callable[..., Branch]


class Room:
    """A scheduler with branches that decode: their prompts are computed, and each has a token."""

    def __init__(self, new_branch: NewBranch, lengths: list[int], num_blocks: int, budget: int = 128) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, 8, budget, enable_prefix_caching=False)
        self.branches = [new_branch(range(length), arrival=at) for at, length in enumerate(lengths)]
        for branch in self.branches:
            self.scheduler.add(branch)
        while any(branch.num_uncomputed for branch in self.branches):
            self.scheduler.complete(self.scheduler.schedule())
        for branch in self.branches:
            branch.token_ids.append(1)

    def draft(self, wanted: list[int]) -> list[int]:
        """Schedule a step and ask for room; how much was given."""
        step = self.scheduler.schedule()
        ready = {span.branch for span in step.spans if span.reaches_end}
        wishes = {
            branch: count for branch, count in zip(self.branches, wanted, strict=True) if branch in ready
        }
        room = self.scheduler.make_room_for_drafts(step, wishes)
        self.scheduler.complete(step)
        return [room.get(branch, 0) for branch in self.branches]

    def settle(self, branch: Branch, tokens: list[int], num_accepted: int) -> None:
        branch.token_ids += tokens
        self.scheduler.settle(branch, num_accepted)


def test_drafts_within_the_last_block_need_no_other(new_branch: NewBranch) -> None:
    room = Room(new_branch, [20], num_blocks=2)
    assert room.draft([11]) == [11]
    assert room.pool.num_held == 2


def test_blocks_for_drafts_go_back_unless_they_are_kept(new_branch: NewBranch) -> None:
    room = Room(new_branch, [14, 14], num_blocks=8)
    assert room.draft([20, 20]) == [20, 20]
    assert [len(branch.block_table) for branch in room.branches] == [3, 3]
    first, second = room.branches
    room.settle(first, [2], 0)
    room.settle(second, [2, 3, 4], 2)
    assert (first.num_computed, len(first.block_table), first.num_spare_blocks) == (15, 1, 0)
    assert (second.num_computed, len(second.block_table), second.num_spare_blocks) == (17, 2, 0)
    assert room.pool.num_held == 3


def test_nobody_is_preempted_for_a_draft(new_branch: NewBranch) -> None:
    room = Room(new_branch, [14, 14, 14], num_blocks=4)
    assert room.draft([20, 4, 1]) == [
        1,
        4,
        1,
    ]  # the first would need two blocks more: it drafts to its own's end
    assert room.scheduler.num_preemptions == 0
    assert len(room.scheduler.running) == 3


def test_drafts_stay_within_the_steps_budget(new_branch: NewBranch) -> None:
    room = Room(new_branch, [17, 17], num_blocks=40, budget=72)
    assert room.draft([60, 60]) == [60, 10]


def test_a_fork_gets_no_block_that_is_for_drafts_only(new_branch: NewBranch) -> None:
    room = Room(new_branch, [14], num_blocks=8)
    (branch,) = room.branches
    room.draft([20])
    branch.token_ids.append(2)
    fork = branch.fork(1, 1)
    assert fork.block_table == branch.block_table[:1]
    room.scheduler.replace([], [fork])
    room.settle(branch, [], 0)
    for each in (branch, fork):
        room.scheduler.remove(each)
    assert room.pool.num_held == 0


def test_a_branch_that_was_preempted_meanwhile_is_not_moved_on(new_branch: NewBranch) -> None:
    room = Room(new_branch, [14, 14], num_blocks=8)
    room.draft([20, 20])
    last = room.branches[1]
    room.scheduler._preempt(last)
    room.settle(last, [2, 3], 1)
    assert (last.num_computed, last.block_table, last.num_spare_blocks) == (0, [], 0)


def test_the_last_token_is_always_left_to_be_computed(new_branch: NewBranch) -> None:
    """All that came was drafted, but the row behind it was not to be used."""
    room = Room(new_branch, [14], num_blocks=8)
    (branch,) = room.branches
    room.draft([4])
    room.settle(branch, [7, 8], 2)
    assert branch.num_computed == 16 == branch.num_tokens - 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drafted_the_books_are_right(new_branch: NewBranch, seed: int) -> None:
    """Random wishes and outcomes under a pool that is too small: no block is lost or held twice."""
    rng = random.Random(seed)
    room = Room(new_branch, [rng.randrange(1, 60) for _ in range(4)], num_blocks=16, budget=128)
    for _ in range(60):
        given = room.draft([rng.randrange(0, 40) for _ in room.branches])
        assert len({block for each in room.branches for block in each.block_table}) == room.pool.num_held
        for branch, count in zip(room.branches, given, strict=True):
            if branch.num_uncomputed == 0:
                accepted = rng.randint(0, count)
                room.settle(branch, [1] * (accepted + 1), accepted)
                assert branch.num_uncomputed == 1
                assert len(branch.block_table) * BLOCK >= branch.num_computed
            elif count:
                room.scheduler.settle(branch, 0)
            if branch.num_tokens > 150:
                room.scheduler.remove(branch)
                room.branches.remove(branch)
                break
        if not room.branches:
            break
    for branch in room.branches:
        room.scheduler.remove(branch)
    assert room.pool.num_held == 0
