"""Prompt lookup by itself: against a search through the whole text, and what it believes of its guesses."""

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadenza.decoding.branch import Branch
from cadenza.decoding.scheduler import Step
from cadenza.decoding.speculation.base import Trust, num_equal
from cadenza.decoding.speculation.ngram import LONGEST, NgramDrafter, NgramIndex, PromptLookup

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def lookup(prompt: list[int]) -> PromptLookup:
    index = NgramIndex()
    index.add(prompt, 0, len(prompt))
    return PromptLookup(index, len(prompt))


def searched(tokens: list[int], limit: int) -> list[int]:
    """The longest suffix at its latest earlier place, and what follows there; the copy may run into itself."""
    for length in range(min(LONGEST, len(tokens)), 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                copied = list(tokens)
                for offset in range(limit):
                    copied.append(copied[start + length + offset])
                return copied[len(tokens) :]
    return []


@given(TOKENS, TOKENS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_guess_is_what_a_search_finds(
    prompt: list[int], answer: list[int], limit: int, cuts: random.Random
) -> None:
    """However many tokens come between two guesses."""
    own = lookup(prompt)
    for end in range(len(answer)):
        if cuts.random() < 0.6:
            tokens = prompt + answer[:end]
            assert own.guess(tokens, limit) == searched(tokens, limit)


def test_nothing_is_guessed_of_what_never_came_before() -> None:
    assert lookup([1, 2, 3]).guess([1, 2, 3, 4], 5) == []
    assert lookup([1]).guess([1], 5) == []


def test_a_loop_is_continued_as_a_loop() -> None:
    assert lookup([7, 8, 9, 7, 8, 9, 7]).guess([7, 8, 9, 7, 8, 9, 7], 7) == [8, 9, 7, 8, 9, 7, 8]


def test_the_latest_place_counts_and_the_answer_before_the_prompt() -> None:
    prompt = [1, 2, 10, 0, 1, 2, 20, 0]
    assert lookup(prompt).guess([*prompt, 1, 2], 1) == [20]
    answered = [*prompt, 1, 2, 30, 0, 1, 2]
    assert lookup(prompt).guess(answered, 1) == [30]


def test_trust_falls_with_what_was_wrong_and_rises_with_what_was_right() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    right, wrong = lookup(prompt), lookup(prompt)
    tokens = [*prompt, 1, 2, 3]
    assert right.guess(tokens, 3) == wrong.guess(tokens, 3) == [4, 5, 6]
    before = right.acceptance
    right.guess([*tokens, 4, 5, 6, 7], 3)
    wrong.guess([*tokens, 9, 1, 2, 3], 3)
    assert wrong.acceptance < before < right.acceptance


def test_only_what_was_judged_is_counted() -> None:
    """Of a guess of four, the second was wrong: the last two were never looked at."""
    trust = Trust(0.0, 0.0)
    trust.learn([1, 2, 3, 4], [1, 9, 9, 9])
    assert (trust.num_right, trust.num_judged) == (1, 2)
    trust = Trust(0.0, 0.0)
    trust.learn([1, 2, 3, 4], [1, 2])
    assert (trust.num_right, trust.num_judged) == (2, 2)
    trust.learn([], [1, 2])
    trust.learn([1, 2], [])
    assert (trust.num_right, trust.num_judged) == (2, 2)


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [2, 2], 0)]
)
def test_num_equal(first: list[int], second: list[int], length: int) -> None:
    assert num_equal(first, second) == num_equal(second, first) == length


def test_branches_of_one_request_share_its_prompt_and_leave_nothing_behind(
    new_branch: Callable[..., Branch],
) -> None:
    drafter = NgramDrafter()
    branches = [
        new_branch(arrival=number // 2, number=number % 2, prompt=[1, 2, 3, 1]) for number in range(4)
    ]
    for branch in branches:
        wish = drafter.wish(branch, 5)
        assert wish is not None
        assert wish.num_tokens == 5
    assert len(drafter._prompts) == 2
    assert drafter.propose(Step(), {branches[0]: 2}, {}) == {branches[0]: [2, 3]}
    for branch in [*branches, branches[0]]:
        drafter.forget(branch)
    assert not drafter._prompts
    assert not drafter._lookups
    assert not drafter._guesses


def test_a_token_costs_microseconds_however_long_the_text_is() -> None:
    """Measured: 4 µs a token behind 8000; the bound leaves room for a busy machine."""
    rng = random.Random(0)
    tokens = [rng.randrange(2000) for _ in range(8000)]
    own = lookup(tokens)
    start = time.perf_counter()
    for _ in range(1000):
        tokens.append(rng.randrange(2000))
        own.guess(tokens, 8)
    assert time.perf_counter() - start < 0.1
