"""best_of: more samples than are returned, ranked by cumulative log-probability (OpenAI's and vLLM's field).

Sample i is choice i of a request for `n = best_of`. The ranking is known when the last sample has ended, so nothing is
sent before. The sum is not divided by the length, as in vLLM. Knows branches and their scores; no text, no tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.request import Unsent
from cadenza.decoding.strategies.base import Needs, Result
from cadenza.decoding.strategies.spec import BestOf

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation


class RankedBranches:
    needs = Needs(scores=True)

    def __init__(self, spec: BestOf, n: int) -> None:
        self._num_samples = spec.best_of
        self._n = n
        self._samples: list[Branch] = []

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        self._samples = [stem, *(generation.fork(stem, index) for index in range(1, self._num_samples))]
        return self._samples

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        for result in results:
            generation.take(result)
        if generation.live:
            return
        ranked = sorted(self._samples, key=lambda sample: (-sample.cumulative_logprob, sample.index))
        for rank, sample in enumerate(ranked[: self._n]):
            generation.send(sample, rank, score=sample.cumulative_logprob)
        if num_unsent := sum(sample.num_generated for sample in ranked[self._n :]):
            generation.tell(Unsent(num_unsent))
