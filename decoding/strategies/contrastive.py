"""Contrastive search (Su et al. 2022, "A Contrastive Framework for Neural Text Generation"), as transformers 4.49
defined it (`GenerationMixin._contrastive_search`).

The `top_k` most likely next tokens are all computed, each at the end of a branch of its own. The one wins that is
likely and whose last hidden state is unlike those of all earlier tokens: its score is

    (1 - penalty_alpha) * probability - penalty_alpha * max cosine to an earlier token's state

A candidate's token must be computed before anyone knows whether it is wanted, even where it would end the answer. So
it only lies at the end of its branch's tokens; the request's text, its ends and its stream hear of it if it wins.
Knows branches, hidden states and scores; no masks, no text, no blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cadenza.decoding.branch import Branch
from cadenza.decoding.request import Decision
from cadenza.decoding.row import Candidates
from cadenza.decoding.strategies.base import Needs, Result
from cadenza.decoding.strategies.spec import ContrastiveSearch

if TYPE_CHECKING:
    from cadenza.decoding.constraints.matcher import Matcher
    from cadenza.decoding.generation import Generation


class States:
    """The last hidden states of all tokens so far, each of length 1."""

    def __init__(self) -> None:
        self._rows = torch.empty(0, 0)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, hidden: Tensor, first: int) -> None:
        """hidden: [tokens, d] of the tokens from position `first` on; those known already are passed over, as a
        branch that was preempted brings them again."""
        assert first <= self._count
        new = normalize(hidden[self._count - first :], dim=-1)
        needed = self._count + len(new)
        if needed > len(self._rows):
            grown = new.new_empty(2 * needed, new.shape[-1])
            if self._count:
                grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        self._rows[self._count : needed] = new
        self._count = needed

    def nearest(self, hidden: Tensor) -> float:
        """The greatest cosine of `hidden` [d] to a state. One candidate at a time, so that the order of summation,
        hence the last bit, does not depend on how many of them were computed in the same step."""
        return float((self._rows[: self._count] @ normalize(hidden, dim=-1)).max())


@dataclass(slots=True)
class _Candidate:
    branch: Branch
    token_id: int
    rank: int
    """Among the candidates by probability; decides between equal scores."""
    probability: float
    decision: Decision
    parent: Result
    """What the step said of the token before: its row holds this token's log-probability."""
    matcher: "Matcher | None" = None
    """The branch's, taken from it while the token is computed that may end the text: nothing may follow."""


@dataclass(slots=True)
class _Contender:
    """A candidate that has been computed, and is the best so far."""

    candidate: _Candidate
    result: Result
    score: float

    @property
    def key(self) -> tuple[float, int]:
        return self.score, -self.candidate.rank


class ContrastiveBranches:
    def __init__(self, spec: ContrastiveSearch) -> None:
        self.needs = Needs(candidates=Candidates(spec.top_k, normalized=True), hidden=True)
        self._alpha = spec.penalty_alpha
        self._states = States()
        self._open: dict[Branch, _Candidate] = {}
        """Candidates that are still to be computed."""
        self._best: _Contender | None = None
        self._lost: list[tuple[int, float]] = []
        """(token id, score) of the candidates that are beaten already."""

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        return [stem]

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        for result in results:
            if (candidate := self._open.pop(result.branch, None)) is not None:
                self._judge(candidate, result, generation)
            elif self._best is None:  # the prompt, or a run of tokens that had no rivals
                assert result.hidden is not None
                self._states.extend(result.hidden, result.first_hidden)
                result.branch.reads_cache = True  # who is preempted from now on need not bring them again
                self._go_on(result, generation)
        if self._best is not None and not self._open:
            self._settle(self._best, generation)

    def _judge(self, candidate: _Candidate, result: Result, generation: "Generation") -> None:
        """Compare a candidate with the best so far; the worse of the two frees its place at once."""
        assert result.hidden is not None
        similarity = self._states.nearest(result.hidden[-1])
        score = (1 - self._alpha) * candidate.probability - self._alpha * similarity
        contenders = [_Contender(candidate, result, score)]
        if self._best is not None:
            contenders.append(self._best)
        self._best, *beaten = sorted(contenders, key=lambda contender: contender.key, reverse=True)
        for contender in beaten:
            self._lost.append((contender.candidate.token_id, contender.score))
            generation.drop(contender.candidate.branch)

    def _settle(self, winner: _Contender, generation: "Generation") -> None:
        candidate, branch = winner.candidate, winner.candidate.branch
        assert winner.result.hidden is not None
        self._states.extend(winner.result.hidden[-1:], len(self._states))
        lost = tuple(sorted(self._lost, key=lambda pair: (-pair[1], pair[0])))
        self._best = None
        self._lost.clear()
        branch.token_ids.pop()
        if candidate.matcher is not None:
            branch.matcher = candidate.matcher
        self._append(candidate, generation, lost)
        if not branch.is_finished and branch.num_tokens == len(self._states):
            self._go_on(winner.result, generation)

    def _go_on(self, result: Result, generation: "Generation") -> None:
        """All tokens of the branch are computed and known: find what may come next."""
        branch = result.branch
        if branch.pending:
            generation.append(branch, replace(result.scored(branch.pending.pop(0)), decision="forced"))
            generation.send(branch)
            return
        candidates = self._candidates(result, generation)
        if len(candidates) == 1:
            self._append(candidates[0], generation)
            return
        for candidate in candidates:
            branch = candidate.branch
            branch.token_ids.append(candidate.token_id)
            if branch.matcher is not None and branch.matcher.is_ended:
                candidate.matcher, branch.matcher = branch.matcher, None
            self._open[branch] = candidate

    def _candidates(self, result: Result, generation: "Generation") -> list[_Candidate]:
        """One for each token that may come next. Where the budget forbids several tokens, the same one takes the place
        of all of them, with the probability of the likeliest."""
        line, pairs = result.branch, result.choice.candidates
        if not pairs:
            raise generation.no_token()
        branches = [line, *(generation.fork(line) for _ in pairs[1:])]
        candidates: dict[int, _Candidate] = {}
        for rank, (branch, (wanted, logprob)) in enumerate(zip(branches, pairs, strict=True)):
            token_id = generation.accept(branch, wanted)
            if token_id in candidates:
                generation.drop(branch)
                continue
            decision: Decision = "searched" if token_id == wanted else "closing"
            candidates[token_id] = _Candidate(branch, token_id, rank, math.exp(logprob), decision, result)
        return list(candidates.values())

    def _append(
        self, candidate: _Candidate, generation: "Generation", lost: tuple[tuple[int, float], ...] = ()
    ) -> None:
        choice = replace(candidate.parent.scored(candidate.token_id), decision=candidate.decision)
        if choice.explanation is not None:
            choice = replace(choice, explanation=replace(choice.explanation, lost=lost))
        generation.append(candidate.branch, choice)
        generation.send(candidate.branch)
