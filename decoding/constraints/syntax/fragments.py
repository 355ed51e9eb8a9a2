"""Regular stretches of a grammar, put together only while they stay small.

One terminal is cheaper to follow than many, but an automaton can be exponentially larger than its expression.
A fragment therefore knows its size, and what would become too large, or risks to, is left apart. Knows nothing
of rules and names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

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


_Other = TypeVar("_Other")


def joined(parts: Sequence[Fragment | _Other], effort: Effort) -> list[Fragment | _Other]:
    """The sequence with neighbouring fragments put together where that is allowed; empty ones dropped."""
    result: list[Fragment | _Other] = []
    run: list[Fragment] = []
    for part in parts:
        if isinstance(part, Fragment):
            if part.expression != EPSILON:
                run.append(part)
        else:
            result += [*_together(run, sequence, _MAX_SIZE, effort), part]
            run = []
    return result + _together(run, sequence, _MAX_SIZE, effort)


def united(options: Sequence[Fragment], effort: Effort) -> list[Fragment]:
    """As few fragments as are allowed that match what any of the options match."""
    words = [option for option in options if _is_word(option.expression)]
    others = [option for option in options if not _is_word(option.expression)]
    return [
        *_together(words, alternative, _MAX_WORDS, effort),
        *_together(others, alternative, _MAX_SIZE, effort),
    ]


def _together(
    fragments: list[Fragment],
    combine: Callable[[Sequence[Fragment], Effort], Fragment | None],
    limit: int,
    effort: Effort,
) -> list[Fragment]:
    result: list[Fragment] = []
    start = size = 0
    for end, fragment in enumerate(fragments):
        effort.spend()
        if size + fragment.size > limit and end > start:
            result += _halves(fragments[start:end], combine, effort)
            start, size = end, 0
        size += fragment.size
    return result + _halves(fragments[start:], combine, effort)


def _halves(
    fragments: list[Fragment],
    combine: Callable[[Sequence[Fragment], Effort], Fragment | None],
    effort: Effort,
) -> list[Fragment]:
    if len(fragments) <= 1:
        return fragments
    whole = combine(fragments, effort)
    if whole is not None:
        return [whole]
    middle = len(fragments) // 2
    return [*_halves(fragments[:middle], combine, effort), *_halves(fragments[middle:], combine, effort)]


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
    characters: list[tuple[int, int]] = []
    for fragment in fragments:
        inner = fragment.expression
        for option in inner.options if isinstance(inner, Alternation) else (inner,):
            if isinstance(option, CharSet):
                characters.extend(option.ranges)
            else:
                options.append(option)
    if characters:
        options.append(CharSet.of(characters))
    options = list(dict.fromkeys(options))
    limit = _MAX_WORDS if all(_is_word(option) for option in options) else _MAX_SIZE
    return _allowed(either(*options), fragments, effort, limit)


def repeated(fragment: Fragment, low: int, high: int | None, effort: Effort) -> Fragment | None:
    if (low, high) == (1, 1):
        return fragment
    return _allowed(Repeat(fragment.expression, low, high), [fragment], effort)


def _is_word(expression: Expression) -> bool:
    if isinstance(expression, Alternation):
        return all(isinstance(option, Literal | CharSet) for option in expression.options)
    return isinstance(expression, Literal | CharSet)


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
