"""Counting votes: who leads, whether that can still change, and how many further samples could decide it.

Samples are begun in the order of their index, so that the votes so far are those of the first samples. Weights are
added up exactly, so that no order of addition and no rounding decides a vote. It knows no texts and no tokens.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from math import comb

from cadenza.decoding.voting.spec import SelfConsistency

_SMALLEST = 5e-324
"""A weight is above 0, however unlikely the sample."""


@dataclass(slots=True)
class Candidate:
    """One answer, and who voted for it."""

    answer: str
    first: int
    """The lowest index of a sample that voted for it: what is returned if it wins."""
    count: int = 0
    weight: Fraction = Fraction(0)

    @property
    def standing(self) -> tuple[Fraction, int]:
        """The winner has the greatest weight; of equal ones the one that was there first wins."""
        return self.weight, -self.first


@dataclass(slots=True)
class Tally:
    spec: SelfConsistency
    num_samples: int = 0
    """How many have finished; those of the lowest indices, whenever it is asked how to go on."""
    candidates: dict[str, Candidate] = field(default_factory=dict)

    def add(self, index: int, answer: str | None, weight: float = 1.0) -> None:
        """Sample `index` has finished. answer: None: it abstains; weight: above 0 and at most 1."""
        self.num_samples += 1
        if answer is None:
            return
        candidate = self.candidates.setdefault(answer, Candidate(answer, index))
        candidate.first = min(candidate.first, index)
        candidate.count += 1
        candidate.weight += Fraction(max(weight, _SMALLEST))

    @property
    def leader(self) -> Candidate | None:
        return max(self.candidates.values(), key=lambda candidate: candidate.standing, default=None)

    def next_wave(self) -> int:
        """How many samples to begin; 0: it is decided. First as few as could decide. If those have not, half of what
        is left, then the rest: an undecided vote takes three times as long as one sample, and not log n times. A rule
        that decides earlier (`confidence`) doubles its samples instead."""
        fewest = self.fewest_to_decision()
        num_left = self.spec.n - self.num_samples
        if fewest == 0 or self.num_samples == 0:
            return fewest
        if 4 * num_left <= self.spec.n:
            return num_left
        return max(fewest, min(-(-num_left // 2), self.num_samples))

    def fewest_to_decision(self) -> int:
        """The fewest further samples after which the vote could be decided, should all of them agree with the leader;
        0: it is decided. Fewer could not decide it, whatever they say."""
        num_left = self.spec.n - self.num_samples
        if not self.spec.stop_when_decided:
            return num_left
        race = Race.of(self)
        fewest = max(0, self.spec.min_samples - self.num_samples)
        return next(more for more in range(fewest, num_left + 1) if race.is_over(more, num_left - more))


@dataclass(frozen=True, slots=True)
class Race:
    """The leader against all others, existing and new."""

    spec: SelfConsistency
    lead: tuple[Fraction, int] | None
    """The leader's standing. None: nobody has answered yet."""
    rival: tuple[Fraction, int]
    """The standing of who comes next; at least that of an answer that nobody has given yet."""
    votes: int
    rival_votes: int

    @classmethod
    def of(cls, tally: Tally) -> "Race":
        leader = tally.leader
        others = [candidate for candidate in tally.candidates.values() if candidate is not leader]
        newcomer = Fraction(0), -tally.spec.n
        return cls(
            spec=tally.spec,
            lead=None if leader is None else leader.standing,
            rival=max([newcomer, *(other.standing for other in others)]),
            votes=0 if leader is None else leader.count,
            rival_votes=max((other.count for other in others), default=0),
        )

    def is_over(self, more: int, left: int) -> bool:
        """After `more` further votes for the leader, each of all the weight that there is, with `left` to come."""
        if left == 0:
            return True
        if self.lead is None and more == 0:
            return False
        weight, order = self.lead or (Fraction(0), 1 - self.spec.n)  # before any that comes later
        others = self.rival[0] + left, self.rival[1]
        return (weight + more, order) > others or self._is_likely(more)

    def _is_likely(self, more: int) -> bool:
        """Adaptive-Consistency (Aggarwal et al. 2023): of the two most common answers the leader is the more likely
        one. By numbers of votes, whatever they weigh."""
        if self.spec.confidence is None:
            return False
        posterior = probability_of_majority(self.votes + more, self.rival_votes)
        return posterior >= Fraction(self.spec.confidence)


def probability_of_majority(votes: int, rival_votes: int) -> Fraction:
    """P(p > 1/2) for p ~ Beta(votes + 1, rival_votes + 1), exactly: that of at most `votes` heads in
    votes + rival_votes + 1 tosses."""
    tosses = votes + rival_votes + 1
    return Fraction(sum(comb(tosses, heads) for heads in range(votes + 1)), 2**tosses)
