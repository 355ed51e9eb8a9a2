"""Rules for the objects of one part: an automaton over members, its states made when they are first reached.

Members are written in one order: the named ones as the schema lists them, then the others. A reader keeps the last
of equal keys. Named keys cannot come twice; other keys can, so nothing may depend on how many different ones there
are, and a member that has to be there for its value comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import Production
from cadenza.decoding.constraints.schema.formula import FALSE, Formula, conjunction
from cadenza.decoding.constraints.schema.free_keys import free_keys
from cadenza.decoding.constraints.schema.object_part import ObjectPart

if TYPE_CHECKING:
    from cadenza.decoding.constraints.schema.emitter import Emitter

_MAX_SOME = 6


@dataclass(frozen=True, slots=True)
class _State:
    position: int = 0
    """The next named member; after the last, the free ones; after those, the end."""
    written: bool = False
    few: int = 0
    """Members so far, as far as `minProperties` counts; of the free ones, one."""
    many: int = 0
    """Members so far, as far as `maxProperties` counts."""
    free: bool = False
    """Whether a free member has counted for `minProperties`."""
    some: frozenset[int] = frozenset()
    """Which of the members that have to be there are."""


class ObjectRules:
    def __init__(self, part: ObjectPart, emitter: Emitter) -> None:
        self._part = part
        self._emitter = emitter
        self._effort = emitter.effort
        self._some = sorted(part.some, key=repr)
        self._low = part.low if part.low > len(part.required) else 0
        self._required = frozenset(part.required)
        empty = emitter.reader.emptiness.no_text
        names = part.names()
        self._free = free_keys(part, names, empty, self._effort)
        if self._counts_free():
            found = [key for keys in self._free for key in keys.few(self._effort)]
            names = [*names, *found]
            self._free = [keys for keys in self._free if not keys.few(self._effort)]
        members = zip(names, part.values(names, self._effort), strict=True)
        self._members = [(name, f) for name, f in members if f != FALSE or name in self._required]
        self._check()
        self._names: dict[_State, str] = {}
        self._waiting: list[_State] = []

    def _counts_free(self) -> bool:
        """Whether it matters how many different free keys there are."""
        return self._low > len(self._part.required) + 1 or bool(self._some)

    def _check(self) -> None:
        if self._free and self._low > len(self._part.required) + 1:
            raise ConstraintError("minProperties above one is not supported where it counts undeclared keys")
        on_free = [s for s, (keys, _) in enumerate(self._some) if any(f.surely_in(keys) for f in self._free)]
        if len(on_free) > 1 or len(self._some) > _MAX_SOME:
            raise ConstraintError("more than one negated schema for undeclared keys is not supported")

    def productions(self) -> list[Production]:
        brackets = self._emitter.punctuation.object
        result: list[Production] = []
        if not (self._part.required or self._low or self._some):
            result.append((brackets.empty,))
        if self._part.high != 0:
            result.append((brackets.open, self._rule(_State()), brackets.close))
        while self._waiting:
            state = self._waiting.pop()
            self._emitter.builder.add(self._names[state], self._continuations(state))
        return result

    def _rule(self, state: _State) -> str:
        if state not in self._names:
            self._names[state] = self._emitter.builder.fresh("members")
            self._waiting.append(state)
        return self._names[state]

    def _continuations(self, state: _State) -> list[Production]:
        if state.position < len(self._members):
            return list(self._named(state))
        result: list[Production] = []
        if state.written and state.few >= self._low and len(state.some) == len(self._some):
            result.append(())
        if state.position == len(self._members):
            result.extend(self._others(state))
        return result

    def _named(self, state: _State) -> Iterator[Production]:
        name, formula = self._members[state.position]
        if not self._full(state):
            key = self._emitter.punctuation.key(name)
            applicable = [i for i, (keys, _) in enumerate(self._some) if keys.surely(name, self._effort)]
            for chosen in _subsets([i for i in applicable if i not in state.some]):
                value = self._demanding(formula, chosen)
                if value != FALSE:
                    following = self._after(state, chosen, state.position + 1, counts=True)
                    yield (*self._comma(state), key, self._emitter.value(value), self._rule(following))
        if name not in self._required:
            skipped = _State(state.position + 1, state.written, state.few, state.many, state.free, state.some)
            yield (self._rule(skipped),)

    def _others(self, state: _State) -> Iterator[Production]:
        if self._full(state):
            return
        for keys in self._free:
            applicable = [i for i, (wanted, _) in enumerate(self._some) if keys.surely_in(wanted)]
            for chosen in _subsets([i for i in applicable if i not in state.some]):
                value = self._demanding(keys.value, chosen)
                if value == FALSE:
                    continue
                position = state.position + bool(chosen)
                following = self._after(state, chosen, position, counts=not state.free)
                key = self._emitter.punctuation.keys(keys.quoted(self._effort))
                yield (*self._comma(state), key, self._emitter.value(value), self._rule(following))

    def _demanding(self, formula: Formula, chosen: tuple[int, ...]) -> Formula:
        return conjunction((formula, *(self._some[i][1] for i in chosen)))

    def _after(self, state: _State, chosen: tuple[int, ...], position: int, counts: bool) -> _State:
        few = min(state.few + counts, self._low)
        many = state.many + 1 if self._part.high is not None else 0
        is_free = state.position >= len(self._members)
        free = bool(self._low) and (state.free or is_free)
        return _State(position, True, few, many, free, state.some | frozenset(chosen))

    def _full(self, state: _State) -> bool:
        return self._part.high is not None and state.many >= self._part.high

    def _comma(self, state: _State) -> Production:
        return (self._emitter.punctuation.comma,) if state.written else ()


def _subsets(indexes: list[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(indexes) + 1):
        yield from combinations(indexes, size)
