"""Patterns with assertions to expressions without (see `assertions` for the idea).

Works from the right: the expression of a node and of all that follows it, for each kind of character before it that
the conditions ahead can tell apart. Knows nothing of the syntax of patterns.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.automata.assertions import (
    AT_END,
    AtEnd,
    Behind,
    Boundary,
    Choice,
    Follows,
    Guarded,
    Node,
    Preceded,
    Sequence,
    is_plain,
    is_zero_width,
    looks_back,
    sequence,
)
from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    ANY_TEXT,
    EPSILON,
    NOTHING,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    either,
    optional,
)
from cadenza.decoding.constraints.automata.guarded import loop_then
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort

_HIGHEST = 0x10FFFF
Before: TypeAlias = CharSet | None
"""The set that the character before is in; None where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rest:
    """A node and what follows it, to the end of the text."""

    node: Node
    after: "_Rest | None"
    looks_back: bool


def without_assertions(node: Node, effort: Effort, *, unanchored: bool) -> Expression:
    """What the whole text must match; unanchored: what it must contain."""
    nodes, behind = _split_off_behind(node, unanchored)
    if unanchored:
        nodes = [ANY_TEXT, *nodes, ANY_TEXT]
    lowering = _Lowering(_conditions(nodes, effort), effort)
    expression = lowering.lower(lowering.rest(sequence(nodes), None), None)
    for condition in behind:
        ending = Concat((ANY_TEXT, condition.body))
        expression = lowering.both(Not(ending) if condition.negative else ending, expression)
    return expression


def _split_off_behind(node: Node, unanchored: bool) -> tuple[list[Node], list[Behind]]:
    """Conditions on the end of the whole text, which are the ones that stand at its end."""
    nodes: list[Node] = list(node.nodes) if isinstance(node, Sequence) else [node]
    first = len(nodes)
    while first and is_zero_width(nodes[first - 1]):
        first -= 1
    if unanchored and AT_END not in nodes[first:]:
        return nodes, []
    tail = nodes[first:]
    behind = [n for n in tail if isinstance(n, Behind)]
    return nodes[:first] + [n for n in tail if not isinstance(n, Behind)], behind


def _conditions(nodes: list[Node], effort: Effort) -> list[CharSet]:
    """A partition of the characters such that each condition on a character before holds for all of a part or none."""
    conditions: dict[CharSet, None] = {}
    pending = list(nodes)
    seen: set[int] = set()
    while pending:
        effort.spend()
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Sequence | Choice):
            pending.extend(node.nodes)
        elif isinstance(node, Follows):
            pending.append(node.node)
        elif isinstance(node, Preceded | Boundary):
            conditions[node.chars if isinstance(node, Preceded) else node.words] = None
    atoms = [ANY_CHAR]
    for chars in conditions:
        effort.spend(64)
        halves = [(atom.intersection(chars), atom.intersection(chars.complement())) for atom in atoms]
        atoms = [half for pair in halves for half in pair if half.ranges]
    return atoms


class _Lowering:
    def __init__(self, atoms: list[CharSet], effort: Effort) -> None:
        self._atoms = atoms
        self._effort = effort
        self._rests: dict[tuple[int, int], _Rest] = {}
        self._lowered: dict[tuple[int, int | None], Expression] = {}

    def rest(self, node: Node, after: _Rest | None) -> _Rest:
        key = (id(node), id(after))
        if key not in self._rests:
            depends = looks_back(node) or (after is not None and after.looks_back)
            self._rests[key] = _Rest(node, after, depends)
        return self._rests[key]

    def lower(self, rest: _Rest | None, before: Before) -> Expression:
        if rest is None:
            return EPSILON
        key = (id(rest), id(before) if rest.looks_back else None)
        if key not in self._lowered:
            self._effort.spend(4)
            self._lowered[key] = self._lower(rest.node, rest.after, before)
        return self._lowered[key]

    def _lower(self, node: Node, after: _Rest | None, before: Before) -> Expression:
        match node:
            case Sequence(nodes):
                for part in reversed(nodes):
                    after = self.rest(part, after)
                return self.lower(after, before)
            case Choice(nodes):
                return _any_of([self.lower(self.rest(option, after), before) for option in nodes])
            case Follows(inner, negative):
                ahead = self.lower(self.rest(inner, self.rest(ANY_TEXT, None)), before)
                return self.both(Not(ahead) if negative else ahead, self.lower(after, before))
            case AtEnd():
                return self.both(EPSILON, self.lower(after, before))
            case Preceded(chars, or_start, negative):
                holds = or_start if before is None else _within(before, chars)
                return NOTHING if holds == negative else self.lower(after, before)
            case Boundary():
                return self._beyond_boundary(node, before, self.lower(after, before))
            case Behind(_, _, position):
                raise ConstraintError(
                    "a lookbehind of more than one character is only enforced where it ends the pattern",
                    where=f"position {position}",
                )
            case Guarded():
                return self._guarded(node, after, before)
            case _:
                return self._plain(node, after, before)

    def _guarded(self, loop: Guarded, after: _Rest | None, before: Before) -> Expression:
        rest = self.lower(after, before)
        if rest == ANY_TEXT and loop.low == 0:
            return ANY_TEXT
        end = self.rest(ANY_TEXT, None)
        before_each = [self.lower(self.rest(condition, end), None) for condition in loop.ahead_before]
        after_each = [self.lower(self.rest(condition, end), None) for condition in loop.ahead_after]
        result = loop_then(Repeat(loop.chars, loop.low, None), before_each, after_each, rest)
        if result is None:
            raise ConstraintError(
                "a lookahead inside a repetition is only enforced where what follows that has one length",
                where=f"position {loop.position}",
            )
        return result

    def _plain(self, part: Expression, after: _Rest | None, before: Before) -> Expression:
        if after is None or not after.looks_back:
            return _join(part, self.lower(after, None))
        options = []
        if self._nullable(part):
            options.append(self.lower(after, before))
        for atom in self._atoms:
            ending = self._ending_in(part, atom)
            if ending != NOTHING:
                options.append(_join(ending, self.lower(after, atom)))
        return _any_of(options)

    def _beyond_boundary(self, node: Boundary, before: Before, rest: Expression) -> Expression:
        in_word = before is not None and _within(before, node.words)
        if in_word == node.negative:
            return self._starting_in(rest, node.words, or_empty=False)
        return self._starting_in(
            rest, node.words.complement(), or_empty=before is not None or node.in_empty_text
        )

    def _ending_in(self, part: Expression, atom: CharSet) -> Expression:
        """The non-empty strings of the part whose last character is in the set."""
        self._effort.spend()
        match part:
            case Literal(text):
                return part if text and _holds(atom, ord(text[-1])) else NOTHING
            case CharSet():
                return _chars(part.intersection(atom))
            case Repeat(CharSet() as chars, low, high):
                before = Repeat(chars, max(low - 1, 0), None if high is None else high - 1)
                return _join(before, _chars(chars.intersection(atom)))
            case Concat(parts) if parts and not self._nullable(parts[-1]):
                return _join(Concat(parts[:-1]), self._ending_in(parts[-1], atom))
            case Alternation(options):
                return _any_of([self._ending_in(option, atom) for option in options])
        if atom == ANY_CHAR and not self._nullable(part):
            return part
        return And((part, Concat((ANY_TEXT, atom))))

    def _starting_in(self, part: Expression, chars: CharSet, *, or_empty: bool) -> Expression:
        """The strings of the part whose first character is in the set, and the empty one if that is asked for."""
        self._effort.spend()
        match part:
            case Literal(text) if text:
                return part if _holds(chars, ord(text[0])) else NOTHING
            case CharSet():
                return _chars(part.intersection(chars))
            case Repeat(CharSet() as body, low, high) if low > 0:
                first = self._starting_in(body, chars, or_empty=False)
                return _join(first, Repeat(body, low - 1, None if high is None else high - 1))
            case Concat((first, *rest)) if not self._nullable(first):
                return _join(self._starting_in(first, chars, or_empty=False), Concat(tuple(rest)))
            case Alternation(options):
                return _any_of([self._starting_in(option, chars, or_empty=or_empty) for option in options])
        begins = Concat((chars, ANY_TEXT))
        return self.both(optional(begins) if or_empty else begins, part)

    def _nullable(self, part: Expression) -> bool:
        self._effort.spend()
        match part:
            case Literal(text):
                return not text
            case CharSet():
                return False
            case Concat(parts) | And(parts):
                return all(self._nullable(each) for each in parts)
            case Alternation(options):
                return any(self._nullable(each) for each in options)
            case Repeat(body, low, _):
                return low == 0 or self._nullable(body)
            case Not(body):
                return not self._nullable(body)

    def both(self, first: Expression, second: Expression) -> Expression:
        if NOTHING in (first, second):
            return NOTHING
        if ANY_TEXT in (first, second):
            return second if first == ANY_TEXT else first
        if EPSILON in (first, second):
            return EPSILON if self._nullable(first) and self._nullable(second) else NOTHING
        return And((first, second))


def _holds(chars: CharSet, code: int) -> bool:
    place = bisect_right(chars.ranges, (code, _HIGHEST)) - 1
    return place >= 0 and chars.ranges[place][1] >= code


def _within(atom: CharSet, chars: CharSet) -> bool:
    """An atom lies in a set that it was made for, or outside of it."""
    return _holds(chars, atom.ranges[0][0])


def _join(first: Expression, second: Expression) -> Expression:
    if NOTHING in (first, second):
        return NOTHING
    joined = sequence((first, second))
    assert is_plain(joined)
    return joined  # type: ignore[return-value]


def _chars(chars: CharSet) -> Expression:
    return chars if chars.ranges else NOTHING


def _any_of(options: list[Expression]) -> Expression:
    kept = {id(option): option for option in options if option != NOTHING}
    return either(*kept.values()) if kept else NOTHING
