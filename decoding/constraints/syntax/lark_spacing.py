"""Ignored text in its places: before every terminal of a Lark grammar, and at the end.

A lexer takes as much as it can: after `// note` no terminal may begin in the middle of the line. So an ignored
terminal that a following one could be mistaken for a part of is "open": it may stand only before what it cannot
swallow, or at the end of the text. That is exact where it can be longer by any single character out of a set, as
comments to the end of a line can; elsewhere it errs on the strict side.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import (
    ANY_TEXT,
    EPSILON,
    And,
    CharSet,
    Expression,
    Repeat,
    concat,
    either,
    star,
)
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.first import first_characters
from cadenza.decoding.constraints.syntax.rules import Group, Item

_JSON_STARTS = CharSet.chars('{["-0123456789tfn')


@dataclass(frozen=True, slots=True)
class Spacing:
    run: Expression
    """Ignored text that any terminal may follow."""
    tail: Expression | None
    """Open ignored text, to follow a run. None: there is none."""
    swallowed: CharSet
    """What may not follow a tail."""

    effort: Effort

    def before(self, terminal: Expression) -> tuple[Item, ...]:
        if self.run == EPSILON and self.tail is None:
            return (terminal,)
        allowed = _not_swallowed(terminal, self.swallowed, self.effort)
        if self.tail is None or allowed is None:
            return (self.run, terminal)
        return (self.run, Group(((terminal,), (self.tail, allowed))))

    def at_end(self) -> Expression:
        return self.run if self.tail is None else concat(self.run, Repeat(self.tail, 0, 1))


def spacing(ignored: Sequence[Expression], terminals: Iterable[Expression], effort: Effort) -> Spacing:
    ranges = [r for terminal in terminals for r in first_characters(terminal, effort).ranges]
    starts = _JSON_STARTS.union(CharSet.of(ranges))
    closed: list[Expression] = []
    open_: list[Expression] = []
    swallowed = CharSet(())
    for unit in ignored:
        longer = _extensions(unit, effort)
        if longer.intersection(starts).ranges:
            open_.append(unit)
            swallowed = swallowed.union(longer)
        else:
            closed.append(_once(unit))
    return _arranged(closed, open_, swallowed, effort)


def _arranged(
    closed: list[Expression], open_: list[Expression], swallowed: CharSet, effort: Effort
) -> Spacing:
    if not open_:
        return Spacing(star(either(*closed)) if closed else EPSILON, None, swallowed, effort)
    once_more = _not_swallowed(either(*open_), swallowed, effort)
    tail = either(*open_) if once_more is None else concat(either(*open_), star(once_more))
    units = list(closed)
    then_closed = _not_swallowed(either(*closed), swallowed, effort) if closed else None
    if then_closed is not None:
        units.append(concat(tail, then_closed))
    return Spacing(star(either(*units)) if units else EPSILON, tail, swallowed, effort)


def _not_swallowed(expression: Expression, swallowed: CharSet, effort: Effort) -> Expression | None:
    """What of it begins with another character; None if that is nothing."""
    allowed = swallowed.complement()
    if not first_characters(expression, effort).intersection(allowed).ranges:
        return None
    return And((expression, concat(allowed, ANY_TEXT)))


def _once(unit: Expression) -> Expression:
    """Of what is repeated anyway, one repetition."""
    is_loop = isinstance(unit, Repeat) and unit.min <= 1 and unit.max is None
    return unit.body if isinstance(unit, Repeat) and is_loop else unit


def _extensions(unit: Expression, effort: Effort) -> CharSet:
    """Characters with which a text of the unit may go on to a longer one."""
    dfa = to_dfa(unit, effort)
    classes = {int(c) for row in dfa.table[dfa.accepting] for c, state in enumerate(row) if state >= 0}
    return CharSet.of(
        characters
        for byte in range(256)
        if int(dfa.byte_class[byte]) in classes
        for characters in _led_by(byte)
    )


def _led_by(byte: int) -> list[tuple[int, int]]:
    """The characters whose UTF-8 form begins with the byte."""
    if byte < 0x80:
        return [(byte, byte)]
    for lead, bits, shift, lowest in (
        (0xC0, 0x1F, 6, 0x80),
        (0xE0, 0x0F, 12, 0x800),
        (0xF0, 0x07, 18, 0x10000),
    ):
        if lead <= byte <= lead | bits:
            first = (byte & bits) << shift
            return [(max(first, lowest), min(first + (1 << shift) - 1, 0x10FFFF))]
    return []
