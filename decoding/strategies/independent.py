"""Greedy decoding and sampling: n branches over one shared prompt, none knowing of the others."""

from collections.abc import Sequence

from cadenza.decoding.branch import Branch
from cadenza.decoding.logits import Choice
from cadenza.decoding.strategies.base import Append


class IndependentBranches:
    def __init__(self, n: int) -> None:
        self._n = n

    def begin(self, root: Branch) -> list[Branch]:
        return [root, *(root.fork(index) for index in range(1, self._n))]

    def advance(self, results: Sequence[tuple[Branch, Choice]]) -> list[Append]:
        return [Append(branch, choice) for branch, choice in results]
