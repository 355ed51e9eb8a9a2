"""Sets of numbers as a schema describes them, closed under intersection and complement. Knows no notation."""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, gcd, lcm

NO_FRACTIONS: frozenset[Fraction] = frozenset()


@dataclass(frozen=True, slots=True)
class Bound:
    value: Fraction
    inclusive: bool


@dataclass(frozen=True, slots=True)
class NumberPart:
    """The numbers that meet every condition."""

    low: Bound | None = None
    high: Bound | None = None
    integral: bool | None = None
    """True: integers only. False: the others only."""
    divisors: frozenset[Fraction] = NO_FRACTIONS
    non_divisors: frozenset[Fraction] = NO_FRACTIONS
    excluded: frozenset[Fraction] = NO_FRACTIONS

    @staticmethod
    def point(value: Fraction) -> "NumberPart":
        return NumberPart(Bound(value, True), Bound(value, True))

    @property
    def is_point(self) -> bool:
        return self.low is not None and self.high is not None and self.low.value == self.high.value

    def intersection(self, other: "NumberPart") -> "NumberPart | None":
        if self.integral is not None and other.integral not in (None, self.integral):
            return None
        both = NumberPart(
            _tighter(self.low, other.low, 1),
            _tighter(self.high, other.high, -1),
            self.integral if self.integral is not None else other.integral,
            self.divisors | other.divisors,
            self.non_divisors | other.non_divisors,
            self.excluded | other.excluded,
        )
        if both.is_empty():
            return None
        return NumberPart(both.low, both.high) if both.is_point else both

    def complement(self) -> list["NumberPart"]:
        """Parts that together hold every other number."""
        if self.is_point:
            assert self.low is not None
            return [NumberPart(excluded=frozenset({self.low.value}))]
        parts = []
        if self.low is not None:
            parts.append(NumberPart(high=Bound(self.low.value, not self.low.inclusive)))
        if self.high is not None:
            parts.append(NumberPart(low=Bound(self.high.value, not self.high.inclusive)))
        if self.integral is not None:
            parts.append(NumberPart(integral=not self.integral))
        parts.extend(NumberPart(non_divisors=frozenset({step})) for step in sorted(self.divisors))
        parts.extend(NumberPart(divisors=frozenset({step})) for step in sorted(self.non_divisors))
        parts.extend(NumberPart.point(value) for value in sorted(self.excluded))
        return parts

    def is_empty(self) -> bool:
        """Whether no number meets the conditions, as far as bounds and steps tell."""
        if self.divisors & self.non_divisors:
            return True
        if self.low is None or self.high is None:
            return False
        if self.low.value > self.high.value:
            return True
        if self.is_point:
            return not (self.low.inclusive and self.high.inclusive and self.admits(self.low.value))
        if (step := self.step()) is None:
            return False
        return next(iter(self.multiples(step)), None) is None

    def admits(self, value: Fraction) -> bool:
        """Whether `value`, which lies within the bounds, meets the other conditions."""
        if self.integral is not None and (value.denominator == 1) != self.integral:
            return False
        if value in self.excluded or any((value / step).denominator != 1 for step in self.divisors):
            return False
        return all((value / step).denominator != 1 for step in self.non_divisors)

    def step(self) -> Fraction | None:
        """Every number of the part is a multiple of this. None: there is no such step."""
        steps = {*self.divisors, *([Fraction(1)] if self.integral else [])}
        if not steps:
            return None
        return Fraction(lcm(*(s.numerator for s in steps)), 1) / _gcd_of_denominators(steps)

    def multiples(self, step: Fraction) -> range:
        """The factors n for which n * step lies within the bounds, which must both be given."""
        assert self.low is not None
        assert self.high is not None
        first, last = self.low.value / step, self.high.value / step
        start = ceil(first) + (first.denominator == 1 and not self.low.inclusive)
        end = floor(last) - (last.denominator == 1 and not self.high.inclusive)
        return range(start, end + 1)


def _gcd_of_denominators(steps: set[Fraction]) -> int:
    """lcm of fractions in lowest terms: lcm of the numerators over gcd of the denominators."""
    return gcd(*(s.denominator for s in steps))


def _tighter(one: Bound | None, two: Bound | None, direction: int) -> Bound | None:
    if one is None or two is None:
        return one or two
    if one.value == two.value:
        return Bound(one.value, one.inclusive and two.inclusive)
    return one if (one.value > two.value) == (direction > 0) else two


def exact(number: int | float) -> Fraction:
    """The value that a validator compares with: of a float, the binary one."""
    return Fraction(number)


def decimal(number: int | float) -> Fraction:
    """The value that was written: of 0.01, a hundredth."""
    return Fraction(Decimal(repr(number)))
