"""Beam search and diverse beam search over branches: what `beams` decides, done to KV caches, matchers and texts.

Every candidate that is considered becomes a fork at once, so that it ends exactly where any branch would, and the
constraint may put another token in its place. One survivor of each beam moves back into the beam's own branch, with
its place in the batch; the other survivors stay forks, the rest are dropped. A text that ended is never computed.

Tokens on which all texts agree that may yet come first go out as choice 0; everything else comes at the end.
Does not know how candidates are ranked, nor what makes a token likely.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.request import RequestError, SamplingParams
from cadenza.decoding.row import Candidates, Choice
from cadenza.decoding.strategies.base import Needs, Result
from cadenza.decoding.strategies.beams import Grown, Search, num_candidates
from cadenza.decoding.strategies.spec import BeamSearch, check_search

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation

_MAX_LENGTH_PENALTY = 50.0  # lengths to a higher power are no longer numbers


def check_beam_search(spec: BeamSearch, sampling: SamplingParams, max_num_seqs: int) -> None:
    """Raises RequestError where other fields, or the size of the batch, exclude the search."""
    check_search(sampling, "beam search")
    if abs(spec.length_penalty) > _MAX_LENGTH_PENALTY:
        rule = f"between {-_MAX_LENGTH_PENALTY:g} and {_MAX_LENGTH_PENALTY:g}"
        raise RequestError(f"length_penalty must be {rule}, got {spec.length_penalty!r}", "length_penalty")
    if sampling.n > spec.num_beams:
        raise RequestError(f"n must be at most num_beams ({spec.num_beams}), got {sampling.n}", "n")
    if spec.num_beams > max_num_seqs:
        raise RequestError(
            f"num_beams must be at most {max_num_seqs} (the server's max_num_seqs: beams are computed"
            f" together), got {spec.num_beams}",
            "num_beams",
        )


@dataclass(slots=True)
class BeamBranches:
    spec: BeamSearch
    n: int
    needs: Needs = field(default_factory=lambda: Needs(jumps=False))
    _search: Search[Branch] = field(init=False)
    _results: dict[Branch, Result] = field(default_factory=dict)
    """Of live beams, until all have theirs."""
    _num_sent: int = 0
    """Tokens of choice 0 that are out."""

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        num_ends = len(generation.eos_token_ids.union(generation.request.sampling.stop_token_ids))
        count = num_candidates(self.spec, num_ends)
        # scores: a constraint may want a token that is not among the candidates
        self.needs = Needs(candidates=Candidates(count, normalized=False), scores=True, jumps=False)
        self._search = Search.start(self.spec, generation.max_tokens, stem)
        return [stem]

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        self._results.update((result.branch, result) for result in results)
        if all(beam in self._results for beam in self._search.live):
            self._step(generation)
            self._results.clear()
            if self._search.is_done:
                self._send_best(generation)
            else:
                self._send_agreed(generation)

    def _step(self, generation: "Generation") -> None:
        before, parents = self._search.live, dict[Branch, Branch]()

        def grow(parent: Branch, token_id: int, logprob: float) -> Grown[Branch]:
            fork = generation.fork(parent)
            parents[fork] = parent
            return _grow(fork, self._results[parent], token_id, logprob, generation)

        self._search.step(lambda beam: self._results[beam].choice.candidates, grow)
        if generation.request.explain:
            self._explain_losses(before, parents)
        self._settle(before, parents, generation)

    def _settle(
        self, before: Mapping[Branch, float], parents: Mapping[Branch, Branch], generation: "Generation"
    ) -> None:
        """The first survivor of each beam moves into the beam's branch; what has none is dropped."""
        survivors = self._search.live
        homes: dict[Branch, Branch] = {}
        taken: set[Branch] = set()
        for fork in survivors:
            if parents[fork] not in taken:
                homes[fork] = parents[fork]
                taken.add(parents[fork])
        for fork in parents:
            if fork in homes:
                _move(fork, homes[fork])
            if fork in homes or (fork not in survivors and not fork.is_finished):
                generation.drop(fork)
        for beam in before:
            if beam not in taken:
                generation.drop(beam)
        self._search.rename(homes)

    def _explain_losses(self, before: Mapping[Branch, float], parents: Mapping[Branch, Branch]) -> None:
        """Every token that was kept is told which others of its beam were not."""
        kept = set(self._search.live) | {hypothesis.item for hypothesis in self._search.complete}
        for beam, total in before.items():
            children = [fork for fork in parents if parents[fork] is beam and fork in kept]
            chosen = {fork.token_ids[-1] for fork in children}
            options = self._results[beam].choice.candidates
            lost = [(token, total + logprob) for token, logprob in options if token not in chosen]
            for fork in children:
                delta = fork.unsent[-1]
                told = tuple(
                    replace(e, lost=tuple(lost[: self.spec.num_beams])) for e in delta.explanations or ()
                )
                fork.unsent[-1] = replace(delta, explanations=told)

    def _send_agreed(self, generation: "Generation") -> None:
        """What begins every live beam and the best complete text, of which one will be choice 0."""
        texts = [*self._search.live, *(hypothesis.item for hypothesis in self._search.complete[:1])]
        first = texts[0]
        num_known = min(text.num_generated - text.is_finished for text in texts)  # an end goes with its score
        while self._num_sent < num_known:
            at = first.num_prompt_tokens + self._num_sent
            if any(text.token_ids[at] != first.token_ids[at] for text in texts):
                break
            generation.tell(first.unsent[self._num_sent])
            self._num_sent += 1

    def _send_best(self, generation: "Generation") -> None:
        best = self._search.complete[: self.n]
        if not best:
            raise generation.no_token()
        del best[0].item.unsent[: self._num_sent]
        for index, hypothesis in enumerate(best):
            generation.send(hypothesis.item, index, score=hypothesis.score)


def _grow(
    fork: Branch, result: Result, token_id: int, logprob: float, generation: "Generation"
) -> Grown[Branch]:
    """Append the candidate to its fork, or what the constraint needs in its place, so that the rest fits."""
    accepted, request = generation.accept(fork, token_id), generation.request
    choice = Choice(accepted, None, "searched")
    if accepted != token_id or request.explain or request.sampling.logprobs is not None:
        choice = result.scored(accepted)
    if accepted != token_id:
        assert choice.logprob is not None
        logprob = dict(result.choice.candidates).get(accepted, choice.logprob.logprob)
        choice = replace(choice, decision="closing")
    generation.append(fork, choice)
    is_cut_off = fork.finish_reason == "length" and generation.remaining(fork) == 0
    return Grown(fork, accepted, logprob, is_ended=fork.is_finished and not is_cut_off)


def _move(fork: Branch, home: Branch) -> None:
    """Make `home` the same text as its fork."""
    home.token_ids, home.text, home.matcher = fork.token_ids, fork.text, fork.matcher
    home.unsent, home.cumulative_logprob = fork.unsent, fork.cumulative_logprob
