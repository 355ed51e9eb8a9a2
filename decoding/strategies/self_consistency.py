"""Self-consistency (Wang et al. 2022): sample several answers, return the one that most of them agree on.

Samples are begun in the order of their index, in waves, the first as many as could decide the vote at best. Each wave
runs to its end, so that the outcome does not depend on which sample is computed faster. Sample i draws with the
noise of choice i of a request for n choices, and so is the same text. All share the KV cache of one prompt; the end
of the prompt that the prefix cache does not hold is computed once more per wave.

How answers are found and counted is the business of `voting`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.request import Unsent, VoteProgress
from cadenza.decoding.strategies.base import Needs, Result
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.decoding.voting.tally import Tally

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation


class VotingBranches:
    def __init__(self, spec: SelfConsistency) -> None:
        self.needs = Needs(scores=spec.weight == "logprob")
        self._spec = spec
        self._tally = Tally(spec)
        self._num_begun = 0
        self._finished: dict[int, Branch] = {}
        self._texts: dict[int, str | None] = {}
        """What each sample answers."""
        self._num_tokens = 0

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        wave = range(self._num_begun, self._num_begun + self._tally.next_wave())
        self._num_begun = wave.stop
        return [stem, *(generation.fork(stem, index) for index in wave[1:])]

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        for result in results:
            generation.take(result)
            if result.branch.is_finished:
                self._count(result.branch, generation)

    def _count(self, sample: Branch, generation: "Generation") -> None:
        """A sample has come to its end; with the last one of its wave it is decided how to go on."""
        answer = self._spec.answer("".join(delta.text for delta in sample.unsent))
        weight = math.exp(sample.cumulative_logprob / sample.num_generated) if self.needs.scores else 1.0
        self._tally.add(sample.index, None if answer is None else answer.key, weight)
        self._texts[sample.index] = None if answer is None else answer.text
        self._finished[sample.index] = sample
        self._num_tokens += sample.num_generated
        generation.tell(self._progress(sample.index))
        if len(self._finished) < self._num_begun:
            return
        if self._tally.next_wave():
            generation.restart(self._num_begun)
        else:
            self._conclude(generation)

    def _conclude(self, generation: "Generation") -> None:
        leader = self._tally.leader
        winner = self._finished.pop(0 if leader is None else leader.first)
        generation.tell(self._progress(winner.index, is_final=True))
        unsent = [delta for sample in self._finished.values() for delta in sample.unsent]
        num_tokens = sum(len(delta.token_ids) for delta in unsent)
        generation.tell(Unsent(num_tokens, sum(delta.num_forced_tokens for delta in unsent)))
        generation.send(winner, index=0)

    def _progress(self, index: int, *, is_final: bool = False) -> VoteProgress:
        candidates = sorted(self._tally.candidates.values(), key=lambda one: one.standing, reverse=True)
        texts = [self._texts[candidate.first] or "" for candidate in candidates]
        num_finished = self._tally.num_samples
        num_stopped = self._spec.n - num_finished if is_final else 0
        return VoteProgress(
            sample=index,
            sample_answer=self._texts[index],
            answer=texts[0] if texts else None,
            counts=tuple(zip(texts, (candidate.count for candidate in candidates), strict=True)),
            weights=tuple(zip(texts, (float(candidate.weight) for candidate in candidates), strict=True)),
            num_finished=num_finished,
            num_stopped=num_stopped,
            num_tokens=self._num_tokens,
            num_tokens_saved=round(num_stopped * self._num_tokens / num_finished),
            is_final=is_final,
        )
