"""Expressions for the decimal notation of ranges of numbers.

A reader turns a numeral without a point into an integer, exactly, and one with a point into the nearest double.
Both are compared here as that reader would: a numeral with a point belongs to a range if its double does, which is
a range of decimal texts again, its ends being halfway between two doubles. Knows nothing of schemas.
"""

import math
from fractions import Fraction

from cadenza.decoding.constraints.automata.expression import (
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
    optional,
)
from cadenza.decoding.constraints.schema.number_part import Bound

INTEGER_DIGITS = 100
"""Digits that a numeral may have before the point, unless a lower bound of the schema has more."""
FRACTION_DIGITS = 20
"""Digits after the point: as many as Python writes of a double that it writes without exponent."""
SCALE = 10**FRACTION_DIGITS

DIGIT = CharSet.of([(ord("0"), ord("9"))])
NONZERO = CharSet.of([(ord("1"), ord("9"))])
MINUS = Literal("-")
POINT = Literal(".")


def digits(low: int, high: int) -> Expression:
    return Repeat(DIGIT, low, high)


def _natural(most: int) -> Expression:
    return either(Literal("0"), concat(NONZERO, digits(0, most - 1)))


def _exponent(*ranges: Expression) -> Expression:
    return concat(CharSet.chars("eE"), optional(CharSet.chars("+-")), either(*ranges))


# No exponent leads beyond the largest double, and none of `_SCIENTIFIC` to zero.
_UP_TO_307 = either(
    concat(CharSet.chars("012"), DIGIT, DIGIT), concat(Literal("30"), CharSet.chars("01234567")), digits(1, 2)
)
_LARGE_EXPONENT = _exponent(_UP_TO_307)
_FRACTION = concat(POINT, digits(1, FRACTION_DIGITS))
_SCIENTIFIC = concat(NONZERO, optional(_FRACTION), _LARGE_EXPONENT)
_HUNDREDTHS = either(
    concat(optional(Literal("0")), CharSet.chars("23456789")),
    concat(NONZERO, DIGIT),
    concat(CharSet.chars("12"), DIGIT, DIGIT),
    concat(Literal("30"), CharSet.chars("01234567")),
)
_SMALL = concat(NONZERO, optional(_FRACTION), CharSet.chars("eE"), MINUS, _HUNDREDTHS)
"""Above zero and below one, in any rounding."""
ANY_NUMBER = concat(
    optional(MINUS),
    either(
        concat(_natural(INTEGER_DIGITS), optional(_FRACTION), optional(_exponent(digits(1, 2)))),
        concat(DIGIT, optional(_FRACTION), _LARGE_EXPONENT),
    ),
)


def scientific(low: Bound | None, high: Bound | None) -> Expression:
    """Numerals with exponent, as far as their sign decides whether they lie in the range, or that they are small."""
    options: list[Expression] = []
    if low is None or low.value <= 0:
        options.extend([_SCIENTIFIC] if high is None else [_SMALL] if high.value >= 1 else [])
    if high is None or high.value >= 0:
        negative = [_SCIENTIFIC] if low is None else [_SMALL] if low.value <= -1 else []
        options.extend(concat(MINUS, option) for option in negative)
    return either(*options)


def _within_reach(low: Bound | None, high: Bound | None) -> tuple[Bound | None, Bound | None]:
    """Bounds that no numeral is long enough to violate bound nothing."""
    most = 10**INTEGER_DIGITS
    return (
        None if low is not None and low.value <= -most else low,
        None if high is not None and high.value >= most else high,
    )


def integers(low: Bound | None, high: Bound | None) -> Expression:
    """Numerals without point or exponent; zero has no sign."""
    low, high = _within_reach(low, high)
    first = None if low is None else math.ceil(low.value)
    if first is not None and low is not None and not low.inclusive and first == low.value:
        first += 1
    last = None if high is None else math.floor(high.value)
    if last is not None and high is not None and not high.inclusive and last == high.value:
        last -= 1
    options = []
    if last is None or last >= 0:
        options.append(naturals(max(first or 0, 0), last))
    if first is None or first < 0:
        negative = naturals(1 if last is None else max(1, -last), None if first is None else -first)
        if negative != NOTHING:
            options.append(concat(MINUS, negative))
    return either(*(o for o in options if o != NOTHING))


def naturals(first: int, last: int | None) -> Expression:
    """first to last in decimal notation; None: as many digits as are allowed."""
    if last is None:
        last = 10 ** max(INTEGER_DIGITS, len(str(first))) - 1
    options: list[Expression] = []
    while first <= last:
        length = len(str(first))
        longest = 10**length - 1
        if first == 10 ** (length - 1) and last >= longest and first > 0:
            full = length if last == longest else len(str(last + 1)) - 1
            options.append(concat(NONZERO, digits(length - 1, full - 1)))
            first = 10**full
            continue
        end = min(last, longest)
        options.append(_between(str(first), str(end)))
        first = end + 1
    return either(*options)


def _between(low: str, high: str) -> Expression:
    """Texts of as many digits as both ends have."""
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), len(low))
    if common == len(low):
        return Literal(low)
    rest = len(low) - common - 1
    bottom, top = int(low[common]), int(high[common])
    options: list[Expression] = []
    if low[common + 1 :].strip("0"):
        options.append(concat(Literal(low[common]), _fixed(low[common + 1 :], above=True)))
        bottom += 1
    if high[common + 1 :].strip("9"):
        options.append(concat(Literal(high[common]), _fixed(high[common + 1 :], above=False)))
        top -= 1
    if bottom <= top:
        middle = CharSet.of([(ord("0") + bottom, ord("0") + top)])
        options.append(concat(middle, digits(rest, rest)) if rest else middle)
    body = either(*options)
    return concat(Literal(low[:common]), body) if common else body


def _fixed(bound: str, above: bool) -> Expression:
    """Texts of as many digits that are at least (`above`) or at most `bound`."""
    options: list[Expression] = [Literal(bound)]
    for i, digit in enumerate(bound):
        others = _beyond(digit, above)
        if others.ranges:
            options.append(_joined(bound[:i], others, digits(len(bound) - i - 1, len(bound) - i - 1)))
    return either(*options)


def _beyond(digit: str, above: bool) -> CharSet:
    return CharSet.of([(ord(digit) + 1, ord("9")) if above else (ord("0"), ord(digit) - 1)])


def _joined(prefix: str, *rest: Expression) -> Expression:
    return Concat((Literal(prefix), *rest)) if prefix else Concat(rest)


def with_point(low: Bound | None, high: Bound | None) -> Expression:
    """Numerals with a point, without exponent, whose nearest double lies in the range; zero has no sign."""
    low, high = _within_reach(low, high)
    first = None if low is None else _first_scaled(low)
    last = None if high is None else _negated(_first_scaled(Bound(-high.value, high.inclusive)))
    if (low is not None and first is None) or (high is not None and last is None):
        return NOTHING
    options: list[Expression] = []
    if last is None or last >= 0:
        options.append(_scaled(max(first or 0, 0), last))
    if first is None or first < 0:
        negative = _scaled(1 if last is None else max(1, -last), None if first is None else -first)
        if negative != NOTHING:
            options.append(concat(MINUS, negative))
    return either(*(o for o in options if o != NOTHING))


def _negated(scaled: int | None) -> int | None:
    return None if scaled is None else -scaled


def _first_scaled(low: Bound) -> int | None:
    """The least decimal, in units of its last place, whose nearest double is above the bound. None: there is none."""
    try:
        least = float(low.value)
    except OverflowError:
        return None if low.value > 0 else -(10**INTEGER_DIGITS) * SCALE
    if Fraction(least) < low.value or (not low.inclusive and Fraction(least) == low.value):
        least = math.nextafter(least, math.inf)
    below = math.nextafter(least, -math.inf)
    if math.isinf(least) or math.isinf(below):
        return None if least > 0 else -(10**INTEGER_DIGITS) * SCALE
    scaled: int = math.ceil((Fraction(below) + Fraction(least)) / 2 * SCALE)
    return scaled if float(Fraction(scaled, SCALE)) >= least else scaled + 1


def _scaled(first: int, last: int | None) -> Expression:
    """Decimals with a point from first to last, both not negative and in units of the last place."""
    whole, fraction = divmod(first, SCALE)
    if last is None:
        last = 10 ** max(INTEGER_DIGITS, len(str(whole))) * SCALE - 1
    if first > last:
        return NOTHING
    last_whole, last_fraction = divmod(last, SCALE)
    options: list[Expression] = []
    if whole == last_whole:
        tail = _tail(fraction, last_fraction)
        return concat(Literal(f"{whole}."), tail)
    if fraction:
        options.append(concat(Literal(f"{whole}."), _tail(fraction, SCALE - 1)))
        whole += 1
    if last_fraction != SCALE - 1:
        options.append(concat(Literal(f"{last_whole}."), _tail(0, last_fraction)))
        last_whole -= 1
    if whole <= last_whole:
        options.append(concat(naturals(whole, last_whole), POINT, digits(1, FRACTION_DIGITS)))
    return either(*options)


def _tail(first: int, last: int) -> Expression:
    """Digits after the point whose value, in units of the last place, lies from first to last."""
    bounds = []
    if first:
        bounds.append(_fraction_at_least(f"{first:0{FRACTION_DIGITS}}".rstrip("0")))
    if last != SCALE - 1:
        bounds.append(_fraction_at_most(f"{last:0{FRACTION_DIGITS}}".rstrip("0")))
    if not bounds:
        return digits(1, FRACTION_DIGITS)
    return bounds[0] if len(bounds) == 1 else And(tuple(bounds))


def _fraction_at_least(bound: str) -> Expression:
    options: list[Expression] = [_joined(bound, digits(0, FRACTION_DIGITS - len(bound)))]
    for i, digit in enumerate(bound):
        others = _beyond(digit, above=True)
        if others.ranges:
            options.append(_joined(bound[:i], others, digits(0, FRACTION_DIGITS - i - 1)))
    return either(*options)


def _fraction_at_most(bound: str) -> Expression:
    if not bound:
        return Repeat(Literal("0"), 1, FRACTION_DIGITS)
    options: list[Expression] = [_joined(bound, Repeat(Literal("0"), 0, FRACTION_DIGITS - len(bound)))]
    options.extend(Literal(bound[:i]) for i in range(1, len(bound)))
    for i, digit in enumerate(bound):
        others = _beyond(digit, above=False)
        if others.ranges:
            options.append(_joined(bound[:i], others, digits(0, FRACTION_DIGITS - i - 1)))
    return Alternation(tuple(options))


def without(numbers: Expression, values: frozenset[Fraction]) -> Expression:
    """No numeral that denotes one of the values."""
    if not values:
        return numbers
    points = [Bound(value, True) for value in sorted(values)]
    return And((numbers, Not(either(*(either(integers(p, p), with_point(p, p)) for p in points)))))


def fractional() -> Expression:
    """Numerals that no reader takes for an integer: at most 15 digits in all, and not only zeros after the point."""
    options = []
    for whole in range(1, 15):
        most = 15 - whole
        tails = [concat(Repeat(Literal("0"), 0, most - 1), NONZERO, digits(0, most - 1))]
        start = _natural(1) if whole == 1 else concat(NONZERO, digits(whole - 1, whole - 1))
        options.append(concat(start, POINT, And((*tails, digits(1, most)))))
    return concat(optional(MINUS), either(*options))
