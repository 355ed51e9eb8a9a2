"""Automata against the definition of their expressions, enumerated; their size against another minimizer."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.automata.build import intersects, is_subset, to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    ANY_TEXT,
    EPSILON,
    NOTHING,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    star,
)
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort

ALPHABET = "abé😀"
LONGEST = 4
TEXTS = ["".join(text) for n in range(LONGEST + 1) for text in itertools.product(ALPHABET, repeat=n)]


def language(expression: Expression) -> frozenset[str]:
    """The strings over ALPHABET of at most LONGEST characters, straight from the definitions."""
    match expression:
        case Literal(text):
            return frozenset([text]) & frozenset(TEXTS)
        case CharSet(ranges):
            return frozenset(c for c in ALPHABET if any(low <= ord(c) <= high for low, high in ranges))
        case Concat(parts):
            texts = frozenset([""])
            for part in parts:
                texts = product(texts, language(part))
            return texts
        case Alternation(options):
            return frozenset().union(*map(language, options))
        case And(parts):
            return frozenset.intersection(*map(language, parts))
        case Not(body):
            return frozenset(TEXTS) - language(body)
        case Repeat(body, low, high):
            return powers(language(body), low, high)


def powers(body: frozenset[str], low: int, high: int | None) -> frozenset[str]:
    found, texts = frozenset(), frozenset([""])
    for count in range((low + LONGEST + 1 if high is None else high) + 1):
        if count >= low:
            found |= texts
        texts = product(texts, body)
    return found


def product(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
    return frozenset(a + b for a in first for b in second if len(a) + len(b) <= LONGEST)


def expressions() -> st.SearchStrategy[Expression]:
    leaves = st.sampled_from(
        [
            EPSILON, NOTHING, ANY_CHAR, ANY_TEXT, Literal("a"), Literal("ab"), Literal("é"), Literal("b😀"),
            CharSet.chars("ab"), CharSet.chars("aé").complement(), CharSet.of([(0xC0, 0x1F600)]),
        ]
    )  # fmt: skip

    def grow(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        several = st.lists(inner, max_size=3).map(tuple)
        return st.one_of(
            several.map(Concat),
            several.map(Alternation),
            st.lists(inner, min_size=1, max_size=2).map(tuple).map(And),
            inner.map(Not),
            st.tuples(inner, st.integers(0, 2), st.sampled_from([None, 0, 1, 3])).map(
                lambda t: Repeat(t[0], t[1], None if t[2] is None else t[1] + t[2])
            ),
        )

    return st.recursive(leaves, grow, max_leaves=8)


def dfa_of(expression: Expression) -> DFA:
    return to_dfa(expression, Effort())


@given(expressions())
@settings(derandomize=True, max_examples=250, deadline=None)
def test_accepts_what_the_definition_says(expression: Expression) -> None:
    dfa = dfa_of(expression)
    wanted = language(expression)
    assert {text for text in TEXTS if dfa.accepts(text.encode())} == wanted


@given(expressions())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_is_minimal_and_trimmed(expression: Expression) -> None:
    dfa = dfa_of(expression)
    assert dfa.num_states == num_states_by_table_filling(dfa)
    if not dfa.is_empty:
        assert (dfa.distance >= 0).all()
        assert dfa.accepts(dfa.shortest(0))
        assert len(dfa.shortest(0)) == shortest_by_search(dfa)


def num_states_by_table_filling(dfa: DFA) -> int:
    """Classes of states that no text tells apart, by marking pairs until nothing changes; a dead state added."""
    n = dfa.num_states
    if n == 0:
        return 0
    table = np.vstack([np.where(dfa.table < 0, n, dfa.table), np.full((1, dfa.table.shape[1]), n)])
    accepting = np.append(dfa.accepting, False)
    differ = accepting[:, None] != accepting[None, :]
    while True:
        following = differ | differ[table[:, None, :], table[None, :, :]].any(axis=2)
        if (following == differ).all():
            break
        differ = following
    alone = [not any(not differ[i, j] for j in range(i)) for i in range(n)]
    dead_like = [not differ[i, n] for i in range(n)]
    return sum(first and not dead for first, dead in zip(alone, dead_like, strict=True))


def shortest_by_search(dfa: DFA) -> int:
    level, length = {0}, 0
    while not any(dfa.accepting[state] for state in level):
        level = {dfa.next(state, byte) for state in level for byte in range(256)} - {-1}
        length += 1
    return length


def test_all_states_are_reachable_and_columns_differ() -> None:
    dfa = dfa_of(concat(star(CharSet.chars("é😀b").complement()), Not(Literal("ab"))))
    reached, pending = {0}, [0]
    while pending:
        for target in set(dfa.table[pending.pop()].tolist()) - reached - {-1}:
            reached.add(target)
            pending.append(target)
    assert reached == set(range(dfa.num_states))
    assert len({tuple(column) for column in dfa.table.T.tolist()}) == dfa.table.shape[1]


def test_any_text_is_exactly_utf8() -> None:
    """Against Python's strict decoder: every sequence of up to two bytes, and the edges of longer ones."""
    dfa = dfa_of(ANY_TEXT)
    edges = [
        0x00,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
        0xED,
        0xEE,
    ]
    edges += [0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    tries = [bytes(text) for n in (1, 2) for text in itertools.product(range(256), repeat=n)]
    tries += [bytes(text) for text in itertools.product(edges, repeat=3)]
    tries += [
        bytes([a, b, c, d])
        for a in edges
        if a >= 0xE0
        for b in edges
        for c in (0x7F, 0x80, 0xBF)
        for d in edges
    ]
    for text in tries:
        assert dfa.accepts(text) == decodes(text), text


def decodes(text: bytes) -> bool:
    try:
        text.decode("utf-8", "strict")
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("first", "last"),
    [(0, 0x7F), (0x7F, 0x80), (0x7FF, 0x800), (0xD7FF, 0xE000), (0xFFFF, 0x10000), (0x10FFFF, 0x10FFFF),
     (0x3C0, 0x2345), (0x800, 0x10FFFE), (0xD800, 0xDFFF), (0x1F600, 0x1F64F)],
)  # fmt: skip
def test_ranges_of_characters(first: int, last: int) -> None:
    dfa = dfa_of(CharSet.of([(first, last)]))
    near = {
        c + d for c in (0, 0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, first, last, 0x10FFFF) for d in range(-2, 3)
    }
    for code in near:
        if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            assert dfa.accepts(chr(code).encode()) == (first <= code <= last), hex(code)
    assert dfa.is_empty == (first >= 0xD800 and last <= 0xDFFF)


def test_not_keys() -> None:
    keys = [f"key_{i * i}" for i in range(40)] + ["", "名前"]
    dfa = dfa_of(Not(Alternation(tuple(map(Literal, keys)))))
    for key in keys:
        assert not dfa.accepts(key.encode())
        assert dfa.accepts((key + "0a").encode())
    assert dfa.accepts("名".encode())
    assert not dfa.accepts("名".encode()[:-1])


def test_large_alternations_and_repetitions() -> None:
    words = [f"{i * 7919 % 10007:04x}-{i}" for i in range(3000)]
    dfa = dfa_of(Alternation(tuple(map(Literal, words))))
    assert all(dfa.accepts(word.encode()) for word in words)
    assert not any(dfa.accepts(word[:-1].encode()) for word in words if word[:-1] not in words)
    counted = dfa_of(Repeat(CharSet.of([(97, 122)]), 2, 1000))
    assert counted.num_states == 1001
    assert [counted.accepts(b"q" * n) for n in (1, 2, 1000, 1001)] == [False, True, True, False]
    nested = dfa_of(Repeat(Repeat(either(Literal("ab"), Literal("c")), 0, 3), 2, 5))
    assert [nested.accepts(b"ab" * n + b"c") for n in (0, 13, 14, 15)] == [True, True, True, False]


def test_distances_along_a_long_chain() -> None:
    dfa = dfa_of(concat(Repeat(CharSet.chars("xyz"), 20_000, 20_000), star(Literal("é"))))
    assert dfa.distance[0] == 20_000
    assert dfa.shortest(0) == b"x" * 20_000
    assert dfa.shortest(dfa.next(int(np.flatnonzero(dfa.accepting)[0]), 0xC3)) == b"\xa9"


def test_shared_parts_are_built_once() -> None:
    """2**60 paths through the tree that the expression stands for."""
    body: Expression = Literal("a")
    for _ in range(60):
        body = Alternation((Concat((CharSet.chars("ab"), body)), Concat((Literal("c"), body))))
    dfa = dfa_of(body)
    assert dfa.num_states == 62
    assert dfa.accepts(b"abc" * 20 + b"a")


def test_empty_language_and_empty_text() -> None:
    empty = dfa_of(And((Literal("a"), Literal("b"))))
    assert empty.is_empty
    assert not empty.accepts(b"")
    assert dfa_of(EPSILON).accepts(b"")
    assert dfa_of(Repeat(NOTHING, 0, 5)).num_states == 1
    assert dfa_of(Repeat(Literal("a"), 3, 2)).is_empty


def test_surrogates_are_refused() -> None:
    with pytest.raises(ConstraintError, match="surrogate"):
        dfa_of(Literal("\ud800"))


@given(expressions(), expressions())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_relations_against_products(first: Expression, second: Expression) -> None:
    a, b = dfa_of(first), dfa_of(second)
    assert intersects(a, b, Effort()) != dfa_of(And((first, second))).is_empty
    assert is_subset(a, b, Effort()) == dfa_of(And((first, Not(second)))).is_empty


def test_automata_can_be_pickled() -> None:
    dfa = dfa_of(ANY_TEXT)
    copy = pickle.loads(pickle.dumps(dfa))
    assert (copy.table == dfa.table).all()
    assert copy.accepts("é".encode())
