"""The step's bitmask: one int32 row per constrained branch, filled in place while the forward pass runs.

Knows branches and their matchers; no logits, no requests.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cadenza.decoding.branch import Branch

_NUM_THREADS = 2
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class StepBitmask:
    words: Tensor | None = None
    """[rows, ceil(V / 32)] int32; None where no branch of the step is constrained."""
    row_of: dict[Branch, int] = field(default_factory=dict)
    errors: dict[Branch, BaseException] = field(default_factory=dict)
    """Branches whose matcher failed. A panic in native code is no `Exception`, but fails no more than its branch."""


class BitmaskFiller:
    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // _WORD_BITS)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "cadenza-masks")

    def start(self, wanted: Sequence[tuple[Branch, int]]) -> "FillingBitmask | None":
        """wanted: branches that get a token in this step, and how many more tokens each may have."""
        if not wanted:
            return None
        words = np.zeros((len(wanted), self._num_words), np.int32)
        tasks = [
            self._threads.submit(_fill, branch, row, remaining)
            for (branch, remaining), row in zip(wanted, words, strict=True)
        ]
        return FillingBitmask([branch for branch, _ in wanted], words, tasks)


@dataclass(frozen=True, slots=True)
class FillingBitmask:
    branches: list[Branch]
    words: "np.typing.NDArray[np.int32]"
    tasks: "list[Future[None]]"

    def result(self) -> StepBitmask:
        """Waits until all rows are filled."""
        errors = {
            branch: error
            for branch, task in zip(self.branches, self.tasks, strict=True)
            if (error := task.exception()) is not None
        }
        row_of = {branch: number for number, branch in enumerate(self.branches)}
        return StepBitmask(torch.from_numpy(self.words), row_of, errors)


def _fill(branch: Branch, row: "np.typing.NDArray[np.int32]", remaining: int) -> None:
    assert branch.matcher is not None
    branch.matcher.fill(row, remaining)
