"""Free text that goes on until a marker, as expressions.

A marker counts where it is complete for the first time, as in the string matching automaton of Aho and Corasick:
a text that ends in the first character of the marker and goes on with all of it contains it one character earlier.
"""

from collections.abc import Sequence

from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    ANY_TEXT,
    And,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
)


def without(strings: Sequence[str], max_chars: int | None = None) -> Expression:
    """Text in which none of the strings occurs."""
    if not strings:
        return ANY_TEXT if max_chars is None else Repeat(ANY_CHAR, 0, max_chars)
    none_of_them = Not(concat(ANY_TEXT, _any_of(strings), ANY_TEXT))
    return none_of_them if max_chars is None else And((none_of_them, Repeat(ANY_CHAR, 0, max_chars)))


def until(
    marker: str, markers: Sequence[str], excluded: Sequence[str] = (), max_chars: int | None = None
) -> Expression:
    """Text without the excluded strings, then the marker, with none of the markers complete any earlier."""
    before = concat(without(excluded, max_chars), Literal(marker))
    return And((before, Not(concat(ANY_TEXT, _any_of(markers), ANY_CHAR, ANY_TEXT))))


def _any_of(strings: Sequence[str]) -> Expression:
    return either(*[Literal(string) for string in dict.fromkeys(strings)])
