"""Multiples of steps in decimal notation. Knows no schemas.

Steps are taken as they are written: 0.07 is a multiple of 0.01, though dividing the doubles says otherwise. Where the
last digits decide, a terminal does it. Otherwise the remainder has to be followed digit by digit, which is a rule for
each remainder: the automaton of the numerals times the remainders.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd, lcm

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    And,
    CharSet,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    optional,
    star,
)
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder, Production, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import numerals
from cadenza.decoding.constraints.schema.number_part import NumberPart

_MAX_ENDINGS = 1000
_MAX_STATES = 10_000
_MOST_DIGITS = 18
"""Of a numeral whose remainder is followed: more would be as many states again."""


def multiples(part: NumberPart, builder: GrammarBuilder, effort: Effort) -> Symbol:
    """The numbers of a part that has steps."""
    step = part.step() if part.divisors else None
    symbol = _endings(part, step)
    return symbol if symbol is not None else _remainders(part, step, builder, effort)


def _endings(part: NumberPart, step: Fraction | None) -> Expression | None:
    """None: the last digits do not decide."""
    forbidden = [_multiples_of(other) for other in sorted(part.non_divisors)]
    wanted = _notations(part, step)
    if step is not None:
        allowed = _multiples_of(step)
        if allowed is None:
            return None
        wanted = And((wanted, allowed))
    conditions = [Not(other) for other in forbidden if other is not None]
    if len(conditions) < len(forbidden):
        return None
    return And((wanted, *conditions)) if conditions else wanted


def _notations(part: NumberPart, step: Fraction | None) -> Expression:
    """Numerals within the bounds. Without a step, those with a point are the ones that surely are no integers."""
    options: list[Expression] = []
    if part.integral is not False:
        options.append(numerals.integers(part.low, part.high))
    if part.integral is not True and (step is None or step.denominator > 1):
        pointed = numerals.with_point(part.low, part.high)
        options.append(
            And((pointed, numerals.fractional())) if step is None or part.integral is False else pointed
        )
    return numerals.without(either(*options), part.excluded)


def _multiples_of(step: Fraction) -> Expression | None:
    """Numerals, with at most as many digits after the point as the step has; None: their ends do not decide."""
    places = _places(step)
    unit = int(step * 10**places)
    if places:
        if 10**places % unit or 10**places // unit > _MAX_ENDINGS:
            return None
        whole = concat(optional(numerals.MINUS), star(numerals.DIGIT))
        return concat(whole, optional(concat(numerals.POINT, _tails(unit, places))))
    if unit == 1:
        return concat(optional(numerals.MINUS), star(numerals.DIGIT))
    length = _ending_length(unit)
    if length is None or 10**length // unit > _MAX_ENDINGS:
        return None
    endings: list[Expression] = [
        concat(star(numerals.DIGIT), Literal(f"{e:0{length}}")) for e in range(0, 10**length, unit)
    ]
    short: list[Expression] = [Literal(str(e)) for e in range(0, 10**length, unit)]
    return concat(optional(numerals.MINUS), either(*endings, *short))


def _tails(unit: int, places: int) -> Expression:
    if unit == 1:
        return numerals.digits(1, places)
    tails = [f"{tail:0{places}}".rstrip("0") or "0" for tail in range(0, 10**places, unit)]
    return either(*(concat(Literal(t), Repeat(Literal("0"), 0, places - len(t))) for t in tails))


def _places(step: Fraction) -> int:
    """Digits after the point."""
    places = 0
    while (step * 10**places).denominator > 1:
        places += 1
    return places


def _ending_length(unit: int) -> int | None:
    """How many last digits decide whether an integer is a multiple; None: no number of them."""
    length = 0
    while 10**length % unit:
        length += 1
        if 10**length // gcd(10**length, unit) > 10 * _MAX_ENDINGS or length > 18:
            return None
    return length


@dataclass(slots=True)
class _Product:
    """Rules for the pairs of a state of the numerals' automaton and a remainder."""

    dfa: DFA
    modulus: int
    places: int
    builder: GrammarBuilder
    names: dict[tuple[int, int, int], str] = field(default_factory=dict)
    waiting: list[tuple[int, int, int]] = field(default_factory=list)

    def rule(self, state: int, remainder: int, digits: int) -> str:
        """digits: after the point; -1: there is none yet."""
        key = (state, remainder, digits)
        if key not in self.names:
            if len(self.names) >= _MAX_STATES:
                raise ConstraintTooComplex(
                    f"multipleOf needs more than {_MAX_STATES} remainders to be told apart"
                )
            self.names[key] = self.builder.fresh("digits")
            self.waiting.append(key)
        return self.names[key]

    def productions(self, state: int, remainder: int, digits: int) -> list[Production]:
        targets: dict[str, list[int]] = defaultdict(list)
        for byte in b"-.0123456789":
            following = self.dfa.next(state, byte)
            if following < 0:
                continue
            if byte == ord("-"):
                targets[self.rule(following, remainder, digits)].append(byte)
            elif byte == ord("."):
                targets[self.rule(following, remainder, 0)].append(byte)
            elif digits < self.places:
                after = (remainder * 10 + byte - ord("0")) % self.modulus
                targets[self.rule(following, after, digits + (digits >= 0))].append(byte)
        return [(CharSet.of((b, b) for b in group), target) for target, group in targets.items()]


def _remainders(part: NumberPart, step: Fraction | None, builder: GrammarBuilder, effort: Effort) -> str:
    numbers = _notations(part, step)
    if step is not None and step.denominator == 1:
        numbers, step = _without_endings(numbers, step)
    steps = [*([step] if step is not None else []), *sorted(part.non_divisors)]
    places = max(_places(s) for s in steps)
    units = [int(s * 10**places) for s in steps]
    limited = And((numbers, Repeat(ANY_CHAR, 1, _MOST_DIGITS)))
    product = _Product(to_dfa(limited, effort), lcm(*units), max(places, 15 if step is None else 0), builder)
    if product.dfa.is_empty:
        return builder.choice([], "digits")
    start = product.rule(0, 0, -1)
    while product.waiting:
        state, remainder, digits = product.waiting.pop()
        productions = product.productions(state, remainder, digits)
        effort.spend(12)
        if product.dfa.accepting[state] and _admits(
            part, step, remainder, max(digits, 0), places, product.modulus
        ):
            productions.append(())
        builder.add(product.names[state, remainder, digits], productions)
    return start


def _without_endings(numbers: Expression, step: Fraction) -> tuple[Expression, Fraction]:
    """Leave the factors 2 and 5 to the last digits; what remains of the step needs fewer remainders."""
    rest = step.numerator
    while rest % 2 == 0:
        rest //= 2
    while rest % 5 == 0:
        rest //= 5
    endings = _multiples_of(step / rest)
    return (numbers, step) if endings is None else (And((numbers, endings)), Fraction(rest))


def _admits(
    part: NumberPart, step: Fraction | None, remainder: int, digits: int, places: int, modulus: int
) -> bool:
    if digits > places:
        return step is None
    value = remainder * 10 ** (places - digits) % modulus
    multiple = [value % int(s * 10**places) == 0 for s in part.non_divisors]
    return not any(multiple) and (step is None or value % int(step * 10**places) == 0)
