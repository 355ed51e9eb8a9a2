"""The questions about automata on which the printed grammar relies, against texts written out."""

from itertools import product

import numpy as np
import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_automata import (
    byte_mask,
    few_words,
    is_suffix_free,
    members_of,
    trimmed,
    without_empty,
)

PATTERNS = [
    "a",
    "ab|b",
    "ab|cb",
    "a*",
    "a*b",
    "(?:ab)+",
    "b(?: ?)",
    "é|aé",
    "aé|bé",
    "(?:a|b){2}",
    "a?b?c?",
    "c|a+b",
]


def dfa_of(pattern: str) -> DFA:
    return to_dfa(parse_regex(pattern, "python", Effort()), Effort())


def texts(dfa: DFA) -> set[bytes]:
    words = ("".join(letters).encode() for length in range(6) for letters in product("abcé ", repeat=length))
    return {word for word in words if dfa.accepts(word)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_suffix_free(pattern: str) -> None:
    known = texts(dfa_of(pattern))
    truth = not any(a != b and a.endswith(b) for a in known for b in known)
    assert is_suffix_free(dfa_of(pattern), Effort()) == truth


@pytest.mark.parametrize("pattern", PATTERNS)
def test_few_words(pattern: str) -> None:
    words = few_words(dfa_of(pattern), 8)
    assert words == (None if any(sign in pattern for sign in "*+") else sorted(texts(dfa_of(pattern))))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_empty(pattern: str) -> None:
    assert texts(without_empty(dfa_of(pattern))) == texts(dfa_of(pattern)) - {b""}


def test_without_empty_of_nothing_else() -> None:
    assert without_empty(dfa_of("")).is_empty


def test_trimmed() -> None:
    """State 2 leads nowhere, state 3 is not reached."""
    dfa = dfa_of("ab")
    table = dfa.table[:, dfa.byte_class].tolist()
    table = [table[0], table[1], table[2], [-1] * 256, table[0]]
    table[0][ord("x")] = 3
    result = trimmed(np.array(table, np.int32), np.array([False, False, True, False, False]))
    assert result.num_states == 3
    assert texts(result) == {b"ab"}


@pytest.mark.parametrize("members", [[], [0], [255], [3, 7, 8, 64, 300]])
def test_masks_are_sets(members: list[int]) -> None:
    assert members_of(byte_mask(members)) == members
