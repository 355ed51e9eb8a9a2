"""The characters that a text of an expression may begin with."""

from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
)
from cadenza.decoding.constraints.limits import Effort

_NONE = CharSet(())


def first_characters(expression: Expression, effort: Effort) -> CharSet:
    """All that begin a text, and with And and Not possibly more."""
    return _first(expression, effort)[0]


def _first(expression: Expression, effort: Effort) -> tuple[CharSet, bool]:
    """Also whether the text may be empty."""
    effort.spend()
    match expression:
        case Literal(text):
            return CharSet.chars(text[:1]), not text
        case CharSet():
            return expression, False
        case Concat(parts):
            starts, is_nullable = _NONE, True
            for part in parts:
                if not is_nullable:
                    break
                more, is_nullable = _first(part, effort)
                starts = starts.union(more)
            return starts, is_nullable
        case Alternation(options):
            found = [_first(option, effort) for option in options]
            ranges = [r for starts, _ in found for r in starts.ranges]
            return CharSet.of(ranges), any(nullable for _, nullable in found)
        case Repeat(body, low, high):
            starts, is_nullable = _first(body, effort)
            return (_NONE, True) if high == 0 else (starts, is_nullable or low == 0)
        case And(parts):
            starts, is_nullable = ANY_CHAR, True
            for part in parts:
                more, nullable = _first(part, effort)
                starts, is_nullable = starts.intersection(more), is_nullable and nullable
            return starts, is_nullable
        case Not():
            return ANY_CHAR, True
