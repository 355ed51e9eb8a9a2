"""Forks at any place of any constraint's text: each does as a matcher that followed the same tokens from the start."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cadenza.decoding.constraints import grammar_masks, llguidance_masks
from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar import chart
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.grammar_masks import GrammarMasks
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher
from cadenza.decoding.constraints.matcher import GrammarMatcher, Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec

from .sampling import SMALL, allowed, bits, constraint_of, mask

BUDGET = 60
PLENTY = 10**6
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "tags": {"type": "array", "items": {"enum": ["ab", "abc", 12, None]}, "maxItems": 9},
        "more": {"$ref": "#"},
    },
    "required": ["tags"],
}
TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f>", "schema": {"type": "array", "items": {"type": "integer"}}, "end": "</f>"}
    ],
    "triggers": ["<f"],
}
SPECS = {
    "regex": ConstraintSpec.regex(r"([a-c]{2,9}[ ,])+\d+(\.\d{1,2})?"),
    "choice": ConstraintSpec.choice(["aab", "aaba" * 9, "the lower " * 3, "true"]),
    "schema": ConstraintSpec.json_schema(SCHEMA),
    "lark": ConstraintSpec.grammar(
        'start: (pair ",")+\npair: /[a-z]+/ "-" (NUMBER | pair)\nNUMBER: /[0-9]+/'
    ),
    "ambiguous": ConstraintSpec.grammar('start: e\ne: e e | e "a" | "(" e ")" | "a" | "ab" | "b"'),
    "gbnf": ConstraintSpec.grammar(
        'root ::= "(" item ("," item)* ")"\nitem ::= root | [0-9]+ | "\\"" [^"]* "\\""'
    ),
    "tag": ConstraintSpec.structural_tag(TAG),
}
CONTEXT_FREE = [name for name in SPECS if name not in ("regex", "choice")]
Source = Callable[[Constraint, pytest.MonkeyPatch], Matcher]


def from_llguidance(constraint: Constraint, patch: pytest.MonkeyPatch) -> Matcher:
    return constraint.matcher()


def from_our_parser(constraint: Constraint, patch: pytest.MonkeyPatch) -> Matcher:
    matcher = constraint.matcher()
    return with_masks(matcher, _never) if isinstance(matcher, GrammarMatcher) else matcher


def slow_after_a_while(constraint: Constraint, patch: pytest.MonkeyPatch) -> Matcher:
    patch.setattr(grammar_masks, "_SLOW_SECONDS", -1.0)
    patch.setattr(grammar_masks, "_MAX_SLOW", 6)
    return constraint.matcher()


def too_much_for_a_shared_lexer(constraint: Constraint, patch: pytest.MonkeyPatch) -> Matcher:
    """At times, and for all forks that share it."""
    rng, original = random.Random(1), MaskMatcher.fill
    broken: set[int] = set()

    def fill(self: MaskMatcher, row: NDArray[np.int32]) -> None:
        if rng.random() < 0.03:
            broken.add(id(self._reading))
        if id(self._reading) in broken:
            raise MatcherError("llguidance: lexer error")
        original(self, row)

    patch.setattr(MaskMatcher, "fill", fill)
    return constraint.matcher()


SOURCES: list[Source] = [
    from_llguidance,
    from_our_parser,
    slow_after_a_while,
    too_much_for_a_shared_lexer,
]


def _never() -> MaskMatcher:
    raise MatcherError("out of fuel")


def with_masks(matcher: Matcher, build: Callable[[], MaskMatcher]) -> GrammarMatcher:
    assert isinstance(matcher, GrammarMatcher)
    return replace(matcher, masks=GrammarMasks(matcher.vocabulary, build))


def check(constraint: Constraint, tokens: Sequence[int], masks: Sequence[NDArray[np.int32]]) -> None:
    """The truth: a matcher made anew that nobody forks."""
    matcher, vocabulary = constraint.matcher(), constraint.tables.vocabulary
    for number, expected in enumerate(masks):
        found = mask(matcher, vocabulary, BUDGET - number)
        np.testing.assert_array_equal(expected, found, err_msg=f"behind {tokens[:number]}")
        if number < len(tokens):
            matcher.accept(tokens[number], BUDGET - number)


def drawn(row: NDArray[np.int32], ends: Sequence[int], rng: random.Random) -> int:
    """Any token, seldom one that ends the answer."""
    candidates = bits(row)
    text_only = [token_id for token_id in candidates if token_id not in ends]
    return rng.choice(text_only if text_only and rng.random() < 0.9 else candidates)


def family(
    root: Matcher, tables: TokenTables, rng: random.Random, num_steps: int
) -> list[tuple[list[int], list[NDArray[np.int32]]]]:
    """The tokens and masks of up to six branches that fork, grow and end at random, in random order."""
    live: list[tuple[Matcher, list[int], list[NDArray[np.int32]]]] = [(root, [], [])]
    done: list[tuple[list[int], list[NDArray[np.int32]]]] = []
    for _ in range(num_steps):
        if not live:
            break
        place = rng.randrange(len(live))
        matcher, tokens, masks = live[place]
        if rng.random() < 0.35 and len(live) < 6:  # with or without a mask since its last token
            live.append((matcher.fork(), tokens.copy(), masks.copy()))
            continue
        remaining = BUDGET - len(tokens)
        if remaining == 0 or matcher.is_ended or (rng.random() < 0.03 and len(live) > 1):
            done.append((tokens, masks))
            del live[place]
            continue
        if len(masks) == len(tokens):
            masks.append(mask(matcher, tables.vocabulary, remaining))
        tokens.append(matcher.accept(drawn(masks[-1], tables.vocabulary.eos_ids, rng), remaining))
    return done + [(tokens, masks) for _, tokens, masks in live]


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, source) for name in SPECS for source in (SOURCES if name in CONTEXT_FREE else SOURCES[:1])],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_random_families(name: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = constraint_of(SPECS[name], SMALL)
    for seed in range(3):
        with monkeypatch.context() as patch:
            branches = family(source(constraint, patch), SMALL, random.Random(f"{name} {seed}"), 120)
        assert len(branches) > 3
        for tokens, masks in branches:
            check(constraint, tokens, masks)


@pytest.mark.parametrize("name", ["schema", "ambiguous", "regex"])
def test_a_family_over_the_real_vocabulary(real_tables: TokenTables, name: str) -> None:
    constraint = constraint_of(SPECS[name], real_tables)
    branches = family(constraint.matcher(), real_tables, random.Random(name), 80)
    for tokens, masks in branches:
        check(constraint, tokens, masks)


@pytest.mark.parametrize("name", SPECS)
def test_forks_are_filled_in_threads_at_the_same_time(name: str) -> None:
    constraint, num_threads = constraint_of(SPECS[name], SMALL), 4
    root = constraint.matcher()
    mask(root, SMALL.vocabulary, BUDGET)
    start = threading.Barrier(num_threads)

    def walk(matcher: Matcher, seed: int) -> tuple[list[int], list[NDArray[np.int32]]]:
        rng, tokens, masks = random.Random(f"{name} {seed}"), list[int](), list[NDArray[np.int32]]()
        start.wait(20)
        while len(tokens) < 40 and not matcher.is_ended:
            masks.append(mask(matcher, SMALL.vocabulary, BUDGET - len(tokens)))
            tokens.append(matcher.accept(rng.choice(bits(masks[-1])), BUDGET - len(tokens)))
            matcher = matcher.fork()
        return tokens, masks

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(walk, [root.fork() for _ in range(num_threads)], range(num_threads)))
    for tokens, masks in found:
        check(constraint, tokens, masks)


# what a fork costs


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    calls: list[None] = []
    original = getattr(owner, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_nothing_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight beams, each forked and dropped at every step: one reading per token, however long the text."""
    constraint, rng = constraint_of(SPECS["schema"], SMALL), random.Random(0)
    followed = counted(monkeypatch, MaskMatcher, "advance")
    parsed = counted(monkeypatch, Parser, "advance")
    built = counted(monkeypatch, llguidance_masks, "_built")
    beams, num_accepted = [constraint.matcher()], 0
    for _ in range(100):
        grown = []
        for beam in beams:
            candidates = allowed(beam, SMALL.vocabulary, PLENTY)
            for _ in range(2):
                fork = beam.fork()
                fork.accept(rng.choice(candidates), PLENTY)
                num_accepted += 1
                if not fork.is_ended:
                    grown.append(fork)
        beams = rng.sample(grown, min(8, len(grown)))
    assert num_accepted > 1000
    assert len(built) == 1
    assert len(parsed) <= num_accepted
    assert len(followed) <= num_accepted


def test_forks_that_copy_much_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a grammar is ambiguous llguidance keeps megabytes for a text; our parser's masks take their place."""
    constraint = constraint_of(SPECS["ambiguous"], SMALL)
    monkeypatch.setattr(grammar_masks, "_SLOW_FORK_SECONDS", -1.0)
    asked = counted(monkeypatch, MaskMatcher, "fill")
    line = [constraint.matcher()]
    for number in range(8):
        line.append(line[-1].fork())
        before = len(asked)
        mask(line[-1], SMALL.vocabulary, BUDGET - number)
        assert (len(asked) > before) == (number < 4)
        line[-1].accept(ord("a"), BUDGET - number)
    mask(constraint.matcher().fork(), SMALL.vocabulary, BUDGET)
    check(constraint, list(b"a" * 8), [mask(line[0], SMALL.vocabulary, BUDGET)])


# what forks share

HARD = ConstraintSpec.grammar('start: "a" /[xyz]*/ | "c" /(a|b)*a(a|b){12}(c|d)(a|b|c)*a(a|b){9}[a-z]*/')


def short_of_fuel(monkeypatch: pytest.MonkeyPatch) -> Constraint:
    """A text that begins with "c" soon takes more than there is; one that begins with "a" never does."""
    limits = llguidance_masks.LLParserLimits(
        step_lexer_fuel=100, initial_lexer_fuel=10**7, precompute_large_lexemes=False, verbose_errors=False
    )
    monkeypatch.setattr(llguidance_masks, "_limits", lambda: limits)
    return constraint_of(HARD, SMALL)


def test_a_fork_that_asks_too_much_is_no_harm_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = short_of_fuel(monkeypatch)
    root = constraint.matcher()
    mask(root, SMALL.vocabulary, BUDGET)
    good, bad = root.fork(), root.fork()
    assert isinstance(good, GrammarMatcher)
    assert isinstance(bad, GrammarMatcher)
    bad_masks = [mask(bad, SMALL.vocabulary, BUDGET)]
    for number, byte in enumerate(b"cababab"):
        bad.accept(byte, BUDGET - number)
        bad_masks.append(mask(bad, SMALL.vocabulary, BUDGET - number - 1))
    assert bad.masks._has_failed
    built = counted(monkeypatch, llguidance_masks, "_built")
    good_masks = [mask(good, SMALL.vocabulary, BUDGET)]
    for number, byte in enumerate(b"axyzzy"):
        good.accept(byte, BUDGET - number)
        good_masks.append(mask(good, SMALL.vocabulary, BUDGET - number - 1))
    assert not good.masks._has_failed
    assert len(built) == 1, "a lexer of its own"
    mask(good.fork(), SMALL.vocabulary, BUDGET - 6)
    assert len(built) == 1, "which its forks share"
    monkeypatch.undo()
    check(constraint, list(b"cababab"), bad_masks)
    check(constraint, list(b"axyzzy"), good_masks)


def test_a_line_of_forks_makes_itself_one_lexer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each that fails would have all others read their texts again."""
    constraint, vocabulary = short_of_fuel(monkeypatch), SMALL.vocabulary
    built = counted(monkeypatch, llguidance_masks, "_built")
    line = constraint.matcher()
    mask(line, vocabulary, BUDGET)
    for _ in range(5):
        bad, line = line.fork(), line.fork()
        for number, byte in enumerate(b"cababab"):
            bad.accept(byte, BUDGET - number)
            mask(bad, vocabulary, BUDGET - number - 1)
        assert allowed(line, vocabulary, BUDGET) == [ord("a"), ord("c")]
    assert isinstance(line, GrammarMatcher)
    assert line.masks._has_failed
    assert len(built) <= 4


def test_each_text_may_be_as_ambiguous_as_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser's work is counted for all forks together: there is as much of it as for each of them."""
    palindromes = 'start: "a" start "a" | "b" start "b" | "(" start "(" | "a" | "b" |'
    constraint = constraint_of(ConstraintSpec.grammar(palindromes), SMALL)

    def text(seed: int) -> list[int]:
        return random.Random(seed).choices(b"ab(", k=40)

    alone = []
    for seed in range(8):
        parser = constraint.matcher().parser  # type: ignore[attr-defined]
        assert parser.advance(bytes(text(seed)))
        alone.append(parser.num_items)
    monkeypatch.setattr(chart, "_MAX_ITEMS", max(alone))
    monkeypatch.setattr(chart, "_MAX_ITEMS_PER_BYTE", 0)
    root = constraint.matcher()
    forks = [root, *(root.fork() for _ in range(7))]
    for place in range(40):
        for seed, fork in enumerate(forks):
            assert fork.accept(text(seed)[place], PLENTY) == text(seed)[place]
    together = root.parser.num_items  # type: ignore[attr-defined]
    assert max(alone) < together <= sum(alone)
