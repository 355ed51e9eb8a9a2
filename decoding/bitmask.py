"""The step's bitmask: int32 rows for each constrained branch, filled in place while the forward pass runs.

Knows branches and their matchers; no logits, no requests.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cadenza.decoding.branch import Branch
from cadenza.decoding.constraints.lookahead import fill_ahead

_NUM_THREADS = 2
_WORD_BITS = 32
_NO_DRAFTS: Mapping[Branch, Sequence[int]] = {}


@dataclass(frozen=True, slots=True)
class StepBitmask:
    words: Tensor | None = None
    """[rows, ceil(V / 32)] int32; None where no branch of the step is constrained."""
    row_of: dict[Branch, int] = field(default_factory=dict)
    """The row of a branch's next token; those behind its drafts follow."""
    num_ahead: dict[Branch, int] = field(default_factory=dict)
    """How many of a branch's drafts its constraint lets pass."""
    errors: dict[Branch, BaseException] = field(default_factory=dict)
    """Branches whose matcher failed. A panic in native code is no `Exception`, but fails no more than its branch."""


def empty_rows(count: int, vocab_size: int) -> "np.typing.NDArray[np.int32]":
    """[count, ceil(V / 32)]: rows of a bitmask that allow nothing."""
    return np.zeros((count, -(-vocab_size // _WORD_BITS)), np.int32)


class BitmaskFiller:
    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "cadenza-masks")

    def start(
        self, wanted: Sequence[tuple[Branch, int]], drafts: Mapping[Branch, Sequence[int]] = _NO_DRAFTS
    ) -> "FillingBitmask | None":
        """wanted: branches that get a token in this step, and how many more tokens each may have."""
        if not wanted:
            return None
        own_drafts = [drafts.get(branch, ()) for branch, _ in wanted]
        first_rows = [0, *accumulate(1 + len(own) for own in own_drafts)]
        words = empty_rows(first_rows.pop(), self._vocab_size)
        tasks = [
            self._threads.submit(_fill, branch, words[first : first + 1 + len(own)], remaining, own)
            for (branch, remaining), own, first in zip(wanted, own_drafts, first_rows, strict=True)
        ]
        return FillingBitmask([branch for branch, _ in wanted], first_rows, words, tasks)


@dataclass(frozen=True, slots=True)
class FillingBitmask:
    branches: list[Branch]
    first_rows: list[int]
    words: "np.typing.NDArray[np.int32]"
    tasks: "list[Future[int]]"

    def result(self) -> StepBitmask:
        """Waits until all rows are filled."""
        errors = {
            branch: error
            for branch, task in zip(self.branches, self.tasks, strict=True)
            if (error := task.exception()) is not None
        }
        num_ahead = {
            branch: task.result()
            for branch, task in zip(self.branches, self.tasks, strict=True)
            if branch not in errors
        }
        row_of = dict(zip(self.branches, self.first_rows, strict=True))
        return StepBitmask(torch.from_numpy(self.words), row_of, num_ahead, errors)


def _fill(branch: Branch, rows: "np.typing.NDArray[np.int32]", remaining: int, drafts: Sequence[int]) -> int:
    """How many drafts pass: the rows behind the others are empty."""
    assert branch.matcher is not None
    fill_ahead(branch.matcher, drafts, remaining, rows)
    return next((number for number, row in enumerate(rows[1:]) if not row.any()), len(drafts))
