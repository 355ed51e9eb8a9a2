"""The bookkeeping of beam search: which continuations live on, which texts are complete, when nothing can improve.

The definition is transformers' (5.23, `GenerationMixin._beam_search`); with several groups, diverse beam search
(Vijayakumar et al. 2018) as transformers 4.49 had it (`_group_beam_search`, `BeamSearchScorer`). Scores are sums of
log-probabilities in double precision, where transformers adds up in float32.

A search is over any items that stand for texts; its caller makes them grow. Knows no tensors, no branches, and not
what ends a text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from cadenza.decoding.strategies.spec import BeamSearch, EarlyStopping

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Grown(Generic[T]):
    """A text with one more token: the one asked for, or another that had to take its place."""

    item: T
    token_id: int
    logprob: float
    is_ended: bool
    """By itself, not because the tokens have run out."""


@dataclass(frozen=True, slots=True)
class Hypothesis(Generic[T]):
    """A complete text."""

    item: T
    score: float
    """The sum of its log-probabilities, divided by length ** length_penalty."""


Options = Sequence[tuple[int, float]]
"""(token, log-probability) of the most likely tokens after some text."""
Grow = Callable[[T, int, float], Grown[T]]
"""From a text, a token and its log-probability."""


def num_candidates(spec: BeamSearch, num_end_tokens: int) -> int:
    """How many of each beam's most likely tokens are enough for the search to be exact.

    A group of g beams looks for its g best continuations that do not end. At most `num_end_tokens` of a beam's tokens
    end it, so g + num_end_tokens of each are enough; 2g, where transformers looks, leaves some for stop strings. The
    other groups' tokens, fewer than num_beams, are made less likely: of so many more, enough are not touched, and
    what is not among these was less likely even before.
    """
    size = spec.num_beams // spec.num_beam_groups
    return max(2 * size, size + num_end_tokens) + (spec.num_beams if spec.num_beam_groups > 1 else 0)


@dataclass(slots=True)
class Hypotheses(Generic[T]):
    """The best complete texts of a group, at most `size`, best first."""

    size: int
    length_penalty: float
    early_stopping: EarlyStopping
    max_length: int
    items: list[Hypothesis[T]] = field(default_factory=list)

    def add(self, item: T, total: float, length: int) -> None:
        """Of equal ones those that came first are kept, and stay in front."""
        self.items.append(Hypothesis(item, self._penalized(total, length)))
        self.items.sort(key=_best_first)
        del self.items[self.size :]

    def is_settled(self, best_total: float, length: int) -> bool:
        """Whether no live beam is expected to become one of these, the best having that sum and that length."""
        if len(self.items) < self.size:
            return False
        if self.early_stopping is True:
            return True
        at_its_best = (
            self.max_length if self.early_stopping == "never" and self.length_penalty > 0 else length
        )
        return self._penalized(best_total, at_its_best) <= self.items[-1].score

    def _penalized(self, total: float, length: int) -> float:
        return total / math.pow(length, self.length_penalty)


@dataclass(order=True, slots=True)
class _Candidate:
    """Ordered best first; of equal ones the lower beam first, then the lower token."""

    cost: float
    """The text's sum of log-probabilities, times -1."""
    beam: int
    token_id: int
    logprob: float = field(compare=False)


@dataclass(slots=True)
class Group(Generic[T]):
    """A beam search of its own, but for the penalties on tokens that other groups have chosen."""

    size: int
    complete: Hypotheses[T]
    is_diverse: bool
    """One of several: where transformers 4.49 did it otherwise than 5, it is 4.49 that counts."""
    live: list[tuple[T, float]]
    """Texts that go on, and their sums of log-probabilities, best first."""
    length: int = 0
    is_done: bool = False

    def step(self, options: Sequence[Options], penalties: Mapping[int, float], grow: Grow[T]) -> list[int]:
        """Let the live beams grow by a token each, given the options of each. Returns the tokens of those that live
        on."""
        self.length += 1
        ranked = self._best(options, penalties, grow)
        live = [(grown.item, total) for grown, total in ranked if not grown.is_ended]
        is_last = self.length == self.complete.max_length
        # In transformers 5, what the last token cuts off competes with what ends there by itself; in 4.49 it comes
        # after that, if better texts are possible still.
        together = is_last and not self.is_diverse
        for grown, total in ranked:
            if grown.is_ended or together:
                self.complete.add(grown.item, total, self.length)
        # Whether better ones may come is asked of the best live beam; in 4.49 of the best candidate, ended or not.
        best = [total for grown, total in ranked if self.is_diverse or not grown.is_ended]
        is_settled = not live or self.complete.is_settled(best[0], self.length)
        if is_last and not together and not is_settled:
            for item, total in live:
                self.complete.add(item, total, self.length)
        self.is_done = is_settled or is_last
        self.live = [] if self.is_done else live
        return [grown.token_id for grown, _ in ranked if not grown.is_ended]

    def _best(
        self, options: Sequence[Options], penalties: Mapping[int, float], grow: Grow[T]
    ) -> list[tuple[Grown[T], float]]:
        """From the best candidate on, until `size` go on. One that ended counts among the `size` best only.

        Where another token takes a candidate's place, it has its turn where its own score puts it, and once.
        """

        def candidate(beam: int, token_id: int, logprob: float) -> _Candidate:
            total = self.live[beam][1] + logprob - penalties.get(token_id, 0.0)
            return _Candidate(-total, beam, token_id, logprob)

        heap = [candidate(beam, *option) for beam, own in enumerate(options) for option in own]
        heapify(heap)
        known: set[tuple[int, int]] = set()
        replaced: dict[tuple[int, int], Grown[T]] = {}
        ranked: list[tuple[Grown[T], float]] = []
        num_live = rank = 0
        while heap and num_live < self.size:
            best = heappop(heap)
            grown = replaced.pop((best.beam, best.token_id), None)
            if grown is None:
                if (best.beam, best.token_id) in known:
                    continue
                grown = grow(self.live[best.beam][0], best.token_id, best.logprob)
                key = (best.beam, grown.token_id)
                if key in known:
                    continue
                known.add(key)
                if grown.token_id != best.token_id:
                    replaced[key] = grown
                    heappush(heap, candidate(best.beam, grown.token_id, grown.logprob))
                    continue
            if not grown.is_ended or rank < self.size:
                ranked.append((grown, -best.cost))
            num_live += not grown.is_ended
            rank += 1
        return ranked


@dataclass(slots=True)
class Search(Generic[T]):
    """All groups of a request, in the order in which each takes note of those before it."""

    groups: list[Group[T]]
    diversity_penalty: float

    @classmethod
    def start(cls, spec: BeamSearch, max_length: int, item: T) -> "Search[T]":
        size = spec.num_beams // spec.num_beam_groups
        # One beam is greedy decoding, in transformers as here: the first text that ends is the answer.
        early: EarlyStopping = True if spec.num_beams == 1 else spec.early_stopping
        groups = [
            Group(
                size,
                Hypotheses[T](size, spec.length_penalty, early, max_length),
                is_diverse=spec.num_beam_groups > 1,
                live=[(item, 0.0)],
            )
            for _ in range(spec.num_beam_groups)
        ]
        return cls(groups, spec.diversity_penalty)

    def step(self, options: Callable[[T], Options], grow: Grow[T]) -> None:
        """One more token for every live beam."""
        penalties: dict[int, float] = {}
        for group in self.groups:
            if group.is_done:
                continue
            chosen = group.step([options(item) for item, _ in group.live], penalties, grow)
            for token_id in chosen:
                penalties[token_id] = penalties.get(token_id, 0.0) + self.diversity_penalty

    @property
    def live(self) -> dict[T, float]:
        """Texts that go on, and their sums of log-probabilities."""
        return dict(pair for group in self.groups for pair in group.live)

    def rename(self, items: Mapping[T, T]) -> None:
        """Live texts are stood for by other items from now on."""
        for group in self.groups:
            group.live = [(items.get(item, item), total) for item, total in group.live]

    @property
    def is_done(self) -> bool:
        return all(group.is_done for group in self.groups)

    @property
    def complete(self) -> list[Hypothesis[T]]:
        """The best complete texts so far, best first."""
        return sorted((item for group in self.groups for item in group.complete.items), key=_best_first)


def _best_first(hypothesis: Hypothesis[T]) -> float:
    return -hypothesis.score
