"""Greedy decoding and sampling: n branches over one shared prompt, none knowing of the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.strategies.base import Needs, Result

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation


class IndependentBranches:
    needs = Needs()

    def __init__(self, n: int) -> None:
        self._n = n

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        return [stem, *(generation.fork(stem, index) for index in range(1, self._n))]

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        for result in results:
            generation.take(result)
            generation.send(result.branch)
