"""Regular stretches of a grammar, put together only while they stay small.

One terminal is cheaper to follow than many, but an automaton can be exponentially larger than its expression.
A fragment therefore knows its size, and what would become too large, or risks to, is left apart. Knows nothing
of rules and names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
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
)
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort

_MAX_SIZE = 400
_MAX_WORDS = 200_000
"""Of plain texts, whose automaton is no larger than they are."""
_MAX_DEPTH = 40
_MAX_STATES = 1500
_CERTAINLY_SMALL = 12
"""Characters of which no automaton is large. Of more, one behind an unbounded repetition may be."""


@dataclass(frozen=True, slots=True)
class Fragment:
    expression: Expression
    size: int
    """Characters of the expression with its counted repetitions written out."""
    depth: int
    is_unbounded: bool


def measured(expression: Expression, effort: Effort) -> Fragment:
    """The size is exact up to a bound far above what is put together, and not counted beyond it."""
    size = depth = 0
    is_unbounded = False
    pending: list[tuple[Expression, int, int]] = [(expression, 1, 1)]
    while pending and size <= 2 * _MAX_WORDS:
        effort.spend()
        part, times, level = pending.pop()
        depth = max(depth, level)
        match part:
            case Literal(text):
                size += times * len(text)
            case CharSet():
                size += times
            case Repeat(body, low, high):
                is_unbounded |= high is None
                pending.append((body, times * max(low, high or 1, 1), level + 1))
            case Concat(parts) | Alternation(parts) | And(parts):
                size += 1  # so that a part without characters ends the loop too
                pending.extend((inner, times, level + 1) for inner in parts)
            case Not(body):
                is_unbounded = True
                pending.append((body, times, level + 1))
    return Fragment(expression, size, depth, is_unbounded)


def sequence(fragments: Sequence[Fragment], effort: Effort) -> Fragment | None:
    parts: list[Expression] = []
    for fragment in fragments:
        inner = fragment.expression
        for part in inner.parts if isinstance(inner, Concat) else (inner,):
            if isinstance(part, Literal) and parts and isinstance(parts[-1], Literal):
                parts[-1] = Literal(parts[-1].text + part.text)
            elif part != EPSILON:
                parts.append(part)
    return _allowed(concat(*parts) if parts else EPSILON, fragments, effort)


def alternative(fragments: Sequence[Fragment], effort: Effort) -> Fragment | None:
    options: list[Expression] = []
    for fragment in fragments:
        inner = fragment.expression
        options.extend(inner.options if isinstance(inner, Alternation) else (inner,))
    whole = union(options)
    limit = _MAX_WORDS if is_word(whole) else _MAX_SIZE
    return _allowed(whole, fragments, effort, limit)


def union(options: Sequence[Expression]) -> Expression:
    """Any of the options, with all single characters as one set."""
    characters = [r for option in options if isinstance(option, CharSet) for r in option.ranges]
    others: list[Expression] = [option for option in options if not isinstance(option, CharSet)]
    if characters:
        others.append(CharSet.of(characters))
    return either(*dict.fromkeys(others))


def is_word(expression: Expression) -> bool:
    """Whether it is a text, a character, or a choice of such: its automaton is no larger than it is."""
    if isinstance(expression, Alternation):
        return all(isinstance(option, Literal | CharSet) for option in expression.options)
    return isinstance(expression, Literal | CharSet)


def repeated(fragment: Fragment, low: int, high: int | None, effort: Effort) -> Fragment | None:
    if (low, high) == (1, 1):
        return fragment
    return _allowed(Repeat(fragment.expression, low, high), [fragment], effort)


def _allowed(
    expression: Expression, fragments: Sequence[Fragment], effort: Effort, limit: int = _MAX_SIZE
) -> Fragment | None:
    """The whole, if it is small and its automaton is. What was one fragment already and did not grow is."""
    if len(fragments) > 1 and sum(fragment.size for fragment in fragments) > limit:
        return None
    whole = measured(expression, effort)
    if len(fragments) == 1 and whole.size <= fragments[0].size + 2 and whole.depth <= _MAX_DEPTH:
        return whole
    if whole.size > limit or whole.depth > _MAX_DEPTH:
        return None
    if whole.is_unbounded and whole.size > _CERTAINLY_SMALL and not _has_small_automaton(expression, effort):
        return None
    return whole


def _has_small_automaton(expression: Expression, effort: Effort) -> bool:
    limits = replace(effort.limits, max_states=_MAX_STATES)
    try:
        to_dfa(expression, Effort(limits, effort.started))
    except ConstraintTooComplex:
        return False
    return True
