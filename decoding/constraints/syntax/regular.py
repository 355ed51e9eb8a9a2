"""Which rules denote regular languages, and the expressions of those.

A rule does if it refers only to such rules, and to itself at most at one end: `ws ::= ([ \\t] ws)?` is `[ \\t]*`
by Arden's lemma. Rules that recur in other ways, or through each other, stay rules. Knows nothing of how rules
are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import EPSILON
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.fragments import Fragment, alternative, measured, repeated, sequence
from cadenza.decoding.constraints.syntax.rules import (
    Body,
    Complement,
    Group,
    Intersection,
    Item,
    Reference,
    references,
)


def regular_body(body: Body, known: Mapping[str, Fragment], effort: Effort) -> Fragment | None:
    """Of a part of a rule, given the rules that are known to be regular."""
    return _Rule("", known, effort).fragment(body)


def regular_rules(rules: Mapping[str, Body], effort: Effort) -> dict[str, Fragment]:
    """The rules whose fragments stay small, each once all that it refers to are known."""
    needs = {name: {r.name for r in references(body)} - {name} for name, body in rules.items()}
    users: dict[str, list[str]] = {}
    for name, needed in needs.items():
        effort.spend(1 + len(needed))
        for other in needed:
            users.setdefault(other, []).append(name)
    known: dict[str, Fragment] = {}
    ready = [name for name, needed in needs.items() if not needed]
    while ready:
        name = ready.pop()
        effort.spend()
        fragment = _Rule(name, known, effort).fragment(rules[name])
        if fragment is None:
            continue
        known[name] = fragment
        for user in users.get(name, ()):
            needs[user].discard(name)
            if not needs[user]:
                ready.append(user)
    return known


@dataclass(frozen=True, slots=True)
class _Linear:
    """The language `loops · rule | exits`, or mirrored. None is the empty set."""

    loops: Fragment | None
    exits: Fragment | None


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    known: Mapping[str, Fragment]
    effort: Effort

    def fragment(self, body: Body) -> Fragment | None:
        """None: not of this form, or too large."""
        is_recursive = any(reference.name == self.name for reference in references(body))
        for mirrored in (False, True) if is_recursive else (False,):
            linear = self._alternatives(body, mirrored)
            if linear is None or linear.exits is None:
                continue
            if linear.loops is None:
                return linear.exits
            many = repeated(linear.loops, 0, None, self.effort)
            if many is not None:
                return sequence([linear.exits, many] if mirrored else [many, linear.exits], self.effort)
        return None

    def _alternatives(self, body: Body, mirrored: bool) -> _Linear | None:
        loops: list[Fragment] = []
        exits: list[Fragment] = []
        for option in body:
            linear = self._sequence(option[::-1] if mirrored else option, mirrored)
            if linear is None:
                return None
            loops += [linear.loops] if linear.loops is not None else []
            exits += [linear.exits] if linear.exits is not None else []
        loop, exit_ = self._either(loops), self._either(exits)
        if (loops and loop is None) or (exits and exit_ is None):
            return None
        return _Linear(loop, exit_)

    def _sequence(self, items: Sequence[Item], mirrored: bool) -> _Linear | None:
        """Items in the order of walking: the recursion is looked for in the last."""
        before = _EMPTY
        for number, item in enumerate(items):
            self.effort.spend()
            linear = self._item(item, mirrored)
            if linear is None or (linear.loops is not None and number < len(items) - 1):
                return None
            loops = self._after(before, linear.loops, mirrored)
            exits = self._after(before, linear.exits, mirrored)
            if (loops is None) != (linear.loops is None) or (exits is None) != (linear.exits is None):
                return None  # too large
            if number == len(items) - 1 or exits is None:
                return _Linear(loops, exits)
            before = exits
        return _Linear(None, before)

    def _item(self, item: Item, mirrored: bool) -> _Linear | None:
        if isinstance(item, Reference):
            if item.name == self.name:
                return _Linear(_EMPTY, None)
            known = self.known.get(item.name)
            return None if known is None else _Linear(None, known)
        if not isinstance(item, Group):
            assert not isinstance(item, Intersection | Complement)
            return _Linear(None, measured(item, self.effort))
        inner = self._alternatives(item.options, mirrored)
        if inner is None or (item.low, item.high) == (1, 1):
            return inner
        if inner.loops is not None:
            if (item.low, item.high) != (0, 1):
                return None
            exits = self._either([_EMPTY, *([inner.exits] if inner.exits is not None else [])])
            return None if exits is None else _Linear(inner.loops, exits)
        if inner.exits is None:
            return inner
        many = repeated(inner.exits, item.low, item.high, self.effort)
        return None if many is None else _Linear(None, many)

    def _after(self, before: Fragment, part: Fragment | None, mirrored: bool) -> Fragment | None:
        if part is None or before is _EMPTY:
            return part
        return sequence([part, before] if mirrored else [before, part], self.effort)

    def _either(self, fragments: Sequence[Fragment]) -> Fragment | None:
        return alternative(fragments, self.effort) if fragments else None


_EMPTY = Fragment(EPSILON, 0, 1, False)
