"""Terminals, or rules where no terminal would do, for sets of numbers."""

import json
from collections.abc import Callable
from fractions import Fraction

from cadenza.decoding.constraints.automata.expression import NOTHING, And, Expression, Literal, either
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import numerals
from cadenza.decoding.constraints.schema.multiples import multiples
from cadenza.decoding.constraints.schema.number_part import NumberPart

_MAX_LISTED = 1000
"""Numbers that are written out one by one where they have to meet more than bounds."""


def number_symbols(
    parts: tuple[NumberPart, ...],
    builder: GrammarBuilder,
    no_text: Callable[[Expression], bool],
    effort: Effort,
) -> list[Symbol]:
    rules: list[Symbol] = []
    terminals: dict[Expression, None] = {}
    for part in parts:
        effort.spend(4)
        if (values := listed(part, _MAX_LISTED)) is not None:
            terminals.update((Literal(numeral(value)), None) for value in values)
        elif isinstance(symbol := _symbol(part, builder, effort), str):
            rules.append(symbol)
        elif symbol != NOTHING and (_only_bounded(part) or not no_text(symbol)):
            terminals[symbol] = None
    return [either(*terminals), *rules] if terminals else rules


def _only_bounded(part: NumberPart) -> bool:
    return part == NumberPart(part.low, part.high, part.integral)


def listed(part: NumberPart, most: int) -> list[Fraction] | None:
    """The numbers of the part, if they are few and a list is needed or short."""
    if part.is_point:
        assert part.low is not None
        return [] if part.is_empty() else [part.low.value]
    step = part.step()
    if step is None or part.low is None or part.high is None:
        return None
    factors = part.multiples(step)
    if len(factors) > most or (len(factors) > 16 and part == NumberPart(part.low, part.high, True)):
        return None
    return [value for value in (step * n for n in factors) if part.admits(value)]


def numeral(value: Fraction) -> str:
    """As `json.dumps` writes the number; integers without a point, unless they are very long."""
    if value.denominator == 1 and (abs(value) < 10**20 or Fraction(float(value)) != value):
        return str(value.numerator)
    return json.dumps(float(value))


def _symbol(part: NumberPart, builder: GrammarBuilder, effort: Effort) -> Symbol:
    if part == NumberPart():
        return numerals.ANY_NUMBER
    if part.divisors or part.non_divisors:
        return multiples(part, builder, effort)
    expression = either(*(option for option in _notations(part) if option != NOTHING))
    return numerals.without(expression, part.excluded)


def _notations(part: NumberPart) -> list[Expression]:
    """Without a point, with one, with an exponent."""
    low, high = part.low, part.high
    if part.integral is True:
        return [numerals.integers(low, high)]
    if part.integral is False:
        return [And((numerals.with_point(low, high), numerals.fractional()))]
    options = [numerals.integers(low, high), numerals.with_point(low, high)]
    return options if part.excluded else [*options, numerals.scientific(low, high)]
