"""Sets of arrays as a schema describes them, closed under intersection and complement."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

from cadenza.decoding.constraints.schema.formula import FALSE, TRUE, Formula, conjunction, negation

Single = Callable[[Formula], Formula]
"""Gives a conjunction a number of its own, so that its negation is a formula."""


@dataclass(frozen=True, slots=True)
class Contains:
    """From low to high of the items at `start` and after it satisfy `item`."""

    start: int
    item: Formula
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class ArrayPart:
    """The arrays that meet every condition."""

    prefix: tuple[Formula, ...] = ()
    rest: Formula = TRUE
    low: int = 0
    high: int | None = None
    contains: frozenset[Contains] = frozenset()
    unique: str | None = None
    """The place of the keyword that forbids equal items."""
    repeated: str | None = None
    """The place of the keyword whose negation demands equal items."""
    evaluated: int = 0
    """Items from the start that `unevaluatedItems` does not speak of. No condition; kept only where that is used."""
    picked: bool = False
    """`contains` has evaluated items here and there. No condition either."""

    def intersection(self, other: "ArrayPart") -> "ArrayPart | None":
        pairs = zip_longest(self.prefix, other.prefix)
        prefix = tuple(
            conjunction((self.rest if mine is None else mine, other.rest if theirs is None else theirs))
            for mine, theirs in pairs
        )
        highs = [high for high in (self.high, other.high) if high is not None]
        both = ArrayPart(
            prefix,
            conjunction((self.rest, other.rest)),
            max(self.low, other.low),
            min(highs) if highs else None,
            self.contains | other.contains,
            self.unique or other.unique,
            self.repeated or other.repeated,
            max(self.evaluated, other.evaluated),
            self.picked or other.picked,
        )
        return both._simplified()

    def _simplified(self) -> "ArrayPart | None":
        """An item that cannot be ends the array before it."""
        high = self.high
        if self.rest == FALSE:
            high = len(self.prefix) if high is None else min(high, len(self.prefix))
        for i, item in enumerate(self.prefix):
            if item == FALSE:
                high = i if high is None else min(high, i)
                break
        if (high is not None and self.low > high) or (self.unique and self.repeated):
            return None
        prefix = self.prefix if high is None else self.prefix[:high]
        rest = FALSE if high is not None and high <= len(prefix) else self.rest
        return replace(self, prefix=prefix, rest=rest, high=high)

    def complement(self, single: Single) -> list["ArrayPart"]:
        parts: list[ArrayPart] = []
        for i, item in enumerate(self.prefix):
            parts.extend(ArrayPart((TRUE,) * i + (no,), low=i + 1) for no in negation(item))
        if self.rest == FALSE:
            parts.append(ArrayPart(low=len(self.prefix) + 1))
        elif self.rest != TRUE:
            (no,) = negation(single(self.rest))
            parts.append(ArrayPart(contains=frozenset({Contains(len(self.prefix), no, 1, None)})))
        if self.low:
            parts.append(ArrayPart(high=self.low - 1))
        if self.high is not None:
            parts.append(ArrayPart(low=self.high + 1))
        for c in self.contains:
            if c.low:
                parts.append(ArrayPart(contains=frozenset({Contains(c.start, c.item, 0, c.low - 1)})))
            if c.high is not None:
                parts.append(ArrayPart(contains=frozenset({Contains(c.start, c.item, c.high + 1, None)})))
        if self.unique:
            parts.append(ArrayPart(repeated=self.unique))
        if self.repeated:
            parts.append(ArrayPart(unique=self.repeated))
        return parts

    def item(self, index: int) -> Formula:
        return self.prefix[index] if index < len(self.prefix) else self.rest
