"""Rules for the arrays of one part: an automaton over items, its states made when they are first reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from cadenza.decoding.constraints.automata.expression import Literal
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import Production, Symbol
from cadenza.decoding.constraints.schema.array_part import ArrayPart, Contains
from cadenza.decoding.constraints.schema.formula import FALSE, Formula, conjunction, negation
from cadenza.decoding.constraints.schema.number_rules import listed, numeral

if TYPE_CHECKING:
    from cadenza.decoding.constraints.schema.emitter import Emitter

_MAX_VALUES = 10
"""Values among which items are kept apart."""


@dataclass(frozen=True, slots=True)
class _State:
    index: int = 0
    """Items so far, counted as far as it matters."""
    counts: tuple[int, ...] = ()
    """How many of them each `contains` has counted, as far as it matters."""
    used: frozenset[str] = frozenset()
    repeated: bool = False


class ArrayRules:
    def __init__(self, part: ArrayPart, emitter: Emitter) -> None:
        self._part = part
        self._emitter = emitter
        self._contains = sorted(part.contains, key=lambda c: (c.start, sorted(c.item), c.low))
        starts = [c.start for c in self._contains]
        self._last_index = max(len(part.prefix), part.low, part.high or 0, *starts, 0, 1)
        """From here on all indexes are alike."""
        self._tells_apart = bool(part.repeated) or (part.unique is not None and part.high not in (0, 1))
        self._names: dict[_State, str] = {}
        self._waiting: list[_State] = []

    def productions(self) -> list[Production]:
        brackets = self._emitter.punctuation.array
        start = _State(counts=(0,) * len(self._contains))
        result: list[Production] = [(brackets.empty,)] if self._may_end(start) else []
        if self._part.high != 0:
            result.append((brackets.open, self._rule(start), brackets.close))
        while self._waiting:
            state = self._waiting.pop()
            self._emitter.builder.add(self._names[state], self._continuations(state))
        return result

    def _rule(self, state: _State) -> str:
        if state not in self._names:
            self._names[state] = self._emitter.builder.fresh("items")
            self._waiting.append(state)
        return self._names[state]

    def _may_end(self, state: _State) -> bool:
        return (
            state.index >= self._part.low
            and all(count >= c.low for count, c in zip(state.counts, self._contains, strict=True))
            and (state.repeated or not self._part.repeated)
        )

    def _continuations(self, state: _State) -> list[Production]:
        result: list[Production] = [()] if state.index and self._may_end(state) else []
        if self._part.high is not None and state.index >= self._part.high:
            return result
        comma: Production = (self._emitter.punctuation.comma,) if state.index else ()
        for formula, counts in self._items(state):
            if formula == FALSE:
                continue
            index = min(state.index + 1, self._last_index)
            for symbol, used, repeated in self._values(formula, state):
                following = _State(index, counts, used, repeated)
                result.append((*comma, symbol, self._rule(following)))
        return result

    def _items(self, state: _State) -> Iterator[tuple[Formula, tuple[int, ...]]]:
        """What the next item may be, and the counts after it."""
        item = self._part.item(state.index)
        choices: list[list[tuple[Formula, int]]] = [
            list(_counting(c, count)) if state.index >= c.start else [(frozenset(), count)]
            for c, count in zip(self._contains, state.counts, strict=True)
        ]
        for choice in product(*choices):
            self._emitter.effort.spend()
            yield conjunction((item, *(f for f, _ in choice))), tuple(count for _, count in choice)

    def _values(self, formula: Formula, state: _State) -> Iterator[tuple[Symbol, frozenset[str], bool]]:
        """The item as a whole, or value by value where equal ones are told apart."""
        if not self._tells_apart or state.repeated:
            yield self._emitter.value(formula), frozenset(), state.repeated
            return
        for text in self._finite(formula):
            if text not in state.used:
                yield Literal(text), state.used | {text}, False
            elif self._part.repeated:
                yield Literal(text), frozenset(), True

    def _finite(self, formula: Formula) -> list[str]:
        shape = self._emitter.reader.emptiness.prune(self._emitter.reader.shape(formula))
        texts = ["null"] if shape.null else []
        texts.extend(json.dumps(value) for value in sorted(shape.booleans))
        for part in shape.strings:
            texts.extend(json.dumps(value, ensure_ascii=False) for value in part.values or ())
        numbers = [listed(part, _MAX_VALUES) for part in shape.numbers]
        texts.extend(numeral(value) for values in numbers for value in values or ())
        infinite = any(part.values is None for part in shape.strings) or any(n is None for n in numbers)
        texts = list(dict.fromkeys(texts))
        if infinite or shape.arrays or shape.objects or len(texts) > _MAX_VALUES:
            raise ConstraintError(
                f"uniqueItems is not supported where items can have more than {_MAX_VALUES} values",
                self._part.unique or self._part.repeated,
            )
        return texts


def _counting(contains: Contains, count: int) -> Iterator[tuple[Formula, int]]:
    """Count the next item or do not. Where there is no upper bound, one that could count may pass uncounted."""
    if contains.high is None:
        if count < contains.low:
            yield contains.item, count + 1
        yield frozenset(), count
        return
    if count < contains.high:
        yield contains.item, count + 1
    for no in negation(contains.item):
        yield no, count
