"""Regular expressions as values: what patterns are parsed to, what schemas and grammars are built of.

An expression denotes a set of strings of Unicode characters (surrogates excluded). Intersection and complement
are ordinary operators. Expressions are immutable, hashable and compare by structure; they know neither how they
were written nor how they are matched.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Literal:
    """One string, which may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CharSet:
    """One character out of a set. Make it with `CharSet.of`, which brings ranges into their normal form."""

    ranges: tuple[tuple[int, int], ...]
    """Inclusive ranges of code points: sorted, disjoint, not adjacent, without surrogates."""

    @staticmethod
    def of(ranges: Iterable[tuple[int, int]]) -> "CharSet":
        merged: list[tuple[int, int]] = []
        for first, last in sorted(_without_surrogates(ranges)):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return CharSet(tuple(merged))

    @staticmethod
    def chars(characters: str) -> "CharSet":
        return CharSet.of((ord(c), ord(c)) for c in characters)

    def complement(self) -> "CharSet":
        gaps, start = [], 0
        for first, last in self.ranges:
            gaps.append((start, first - 1))
            start = last + 1
        gaps.append((start, _LAST))
        return CharSet.of(gaps)

    def union(self, other: "CharSet") -> "CharSet":
        return CharSet.of((*self.ranges, *other.ranges))

    def intersection(self, other: "CharSet") -> "CharSet":
        return self.complement().union(other.complement()).complement()


@dataclass(frozen=True, slots=True)
class Concat:
    parts: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Alternation:
    """Any of the options; of none, nothing matches."""

    options: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    body: "Expression"
    min: int
    max: int | None
    """None: without bound."""


@dataclass(frozen=True, slots=True)
class And:
    """What all of the parts match; at least one part."""

    parts: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Not:
    """Every string of characters that the body does not match."""

    body: "Expression"


Expression: TypeAlias = Literal | CharSet | Concat | Alternation | Repeat | And | Not

EPSILON = Literal("")
NOTHING = Alternation(())


def concat(*parts: Expression) -> Expression:
    return parts[0] if len(parts) == 1 else Concat(parts)


def either(*options: Expression) -> Expression:
    return options[0] if len(options) == 1 else Alternation(options)


def optional(body: Expression) -> Expression:
    return Repeat(body, 0, 1)


def star(body: Expression) -> Expression:
    return Repeat(body, 0, None)


def plus(body: Expression) -> Expression:
    return Repeat(body, 1, None)


def _without_surrogates(ranges: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    low, high = _SURROGATES
    for first, last in ranges:
        if first > last:
            continue
        if last < low or first > high:
            yield first, last
            continue
        if first < low:
            yield first, low - 1
        if last > high:
            yield high + 1, last


ANY_CHAR = CharSet.of([(0, _LAST)])
ANY_TEXT = star(ANY_CHAR)
