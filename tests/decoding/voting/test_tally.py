"""Votes against all ways in which they can go on: when they are decided, who wins, how many samples are begun."""

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from scipy.stats import beta

from cadenza.decoding.request import RequestError
from cadenza.decoding.voting.answer import FullText
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.decoding.voting.tally import Tally, probability_of_majority

Vote = tuple[str | None, Fraction]
"""The answer, or None for an abstention, and its weight."""
Result = tuple[str | None, int]
"""The winner and the sample that is returned."""

ABSTAINS: Vote = (None, Fraction(1))
COUNTS: list[Vote] = [ABSTAINS, *((answer, Fraction(1)) for answer in "abc")]
WEIGHTS: list[Vote] = [
    ABSTAINS,
    *((a, w) for a in "ab" for w in (Fraction(1, 4), Fraction(3, 4), Fraction(1))),
]


def spec(n: int, **fields: Any) -> SelfConsistency:
    return SelfConsistency(n=n, answer=FullText(), **fields)


def full_vote(votes: Sequence[Vote]) -> Result:
    """The rule as the documentation says it, over all votes."""
    totals: dict[str, Fraction] = {}
    for answer, weight in votes:
        if answer is not None:
            totals[answer] = totals.get(answer, Fraction(0)) + weight
    if not totals:
        return None, 0
    answers = [answer for answer, _ in votes]
    winner = min(totals, key=lambda answer: (-totals[answer], answers.index(answer)))
    return winner, answers.index(winner)


def tally_of(votes: Sequence[Vote], n: int, **fields: Any) -> Tally:
    tally = Tally(spec(n, **fields))
    for index, (answer, weight) in enumerate(votes):
        tally.add(index, answer, float(weight))
    return tally


def result_of(tally: Tally) -> Result:
    leader = tally.leader
    return (None, 0) if leader is None else (leader.answer, leader.first)


@pytest.mark.parametrize(
    ("n", "ballot"), [*((n, COUNTS) for n in range(1, 8)), *((n, WEIGHTS) for n in range(1, 6))]
)
def test_waves_against_every_way_to_go_on(n: int, ballot: list[Vote]) -> None:
    """After every sequence of votes: it is stopped exactly where all ways to go on have one result, and otherwise
    as many samples are begun as the shortest way to such a place has."""
    weight = "count" if ballot is COUNTS else "logprob"

    @cache
    def results(votes: tuple[Vote, ...]) -> frozenset[Result]:
        if len(votes) == n:
            return frozenset([full_vote(votes)])
        return frozenset().union(*(results((*votes, vote)) for vote in ballot))

    @cache
    def to_decision(votes: tuple[Vote, ...]) -> int:
        if len(results(votes)) == 1:
            return 0
        return 1 + min(to_decision((*votes, vote)) for vote in ballot)

    for length in range(n + 1):
        for votes in itertools.product(ballot, repeat=length):
            tally = tally_of(votes, n, weight=weight)
            assert tally.fewest_to_decision() == to_decision(votes), votes
            if len(results(votes)) == 1:
                assert result_of(tally) == next(iter(results(votes))), votes


def test_the_order_in_which_samples_finish_changes_nothing() -> None:
    """Added up in floats, 0.1 + 0.2 + 0.3 would depend on the order, and so beat 0.6 or not."""
    votes = [("a", 0.6), ("b", 0.1), ("b", 0.2), ("b", 0.3)]
    results = set()
    for order in itertools.permutations(range(4)):
        tally = Tally(spec(4, weight="logprob"))
        for index in order:
            tally.add(index, *votes[index])
        results.add((result_of(tally), tuple(sorted(one.weight for one in tally.candidates.values()))))
    exact = sum(map(Fraction, (0.1, 0.2, 0.3)))
    assert results == {
        ((("a", 0) if Fraction(0.6) >= exact else ("b", 1)), tuple(sorted((Fraction(0.6), exact))))
    }


@pytest.mark.parametrize("min_samples", [1, 5, 8, 9, 12, 16])
def test_at_least_min_samples_are_begun(min_samples: int) -> None:
    tally = Tally(spec(16, min_samples=min_samples))
    assert tally.fewest_to_decision() == max(8, min_samples)
    for index in range(3):
        tally.add(index, "a")
    assert tally.fewest_to_decision() == max(5, min_samples - 3)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 128])
def test_a_vote_takes_three_waves_at_most(n: int) -> None:
    """As few as could decide, half of what is left, the rest; never fewer than could decide."""
    for seed in range(20):
        draw, tally, waves = random.Random(seed), Tally(spec(n)), []
        while wave := tally.next_wave():
            assert tally.fewest_to_decision() <= wave <= n - tally.num_samples
            waves.append(wave)
            for index in range(tally.num_samples, tally.num_samples + wave):
                tally.add(index, draw.choice("abc"))
        assert waves[0] == -(-n // 2)
        assert len(waves) <= 3
    assert n < 3 or len(waves) > 1


def test_without_stopping_all_samples_are_one_wave() -> None:
    tally = Tally(spec(5, stop_when_decided=False))
    assert tally.fewest_to_decision() == 5
    for index in range(4):
        tally.add(index, "a")
    assert tally.fewest_to_decision() == 1


def test_the_probability_of_a_majority_is_the_beta_distributions() -> None:
    for votes, rivals in itertools.product(range(40), repeat=2):
        expected = beta.sf(0.5, votes + 1, rivals + 1)
        assert float(probability_of_majority(votes, rivals)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95, 0.999])
def test_the_adaptive_rule(confidence: float) -> None:
    """After every sequence of votes of two answers: stopped where the posterior or certainty says so; the wave is the
    fewest further votes for the leader that would bring it there."""

    def is_over(a: int, b: int, n: int) -> bool:
        exact = tally_of([("a", Fraction(1))] * a + [("b", Fraction(1))] * b, n).fewest_to_decision() == 0
        return exact or beta.sf(0.5, a + 1, b + 1) >= confidence

    n = 14
    for a in range(n + 1):
        for b in range(min(a, n - a) + 1):
            votes = [("a", Fraction(1))] * a + [("b", Fraction(1))] * b
            wave = tally_of(votes, n, confidence=confidence).fewest_to_decision()
            if a:
                assert wave == next(more for more in range(n) if is_over(a + more, b, n))
            else:
                assert wave == next(more for more in range(1, n) if is_over(more, 0, n))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"weight": "votes"}, "weight"),
        ({"min_samples": 0}, "min_samples"),
        ({"min_samples": 9}, "min_samples"),
        ({"confidence": 0.5}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": float("nan")}, "confidence"),
        ({"confidence": 0.9, "stop_when_decided": False}, "confidence"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        spec(**{"n": 8, **fields})
    assert caught.value.param == f"self_consistency.{param}"


def test_a_weight_of_nothing_still_counts() -> None:
    tally = Tally(spec(3, weight="logprob"))
    tally.add(0, "a", 0.0)
    tally.add(1, None)
    tally.add(2, None)
    assert result_of(tally) == ("a", 0)
    assert tally.fewest_to_decision() == 0
