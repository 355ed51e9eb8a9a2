"""The automaton of a terminal seen by whole characters, as pieces of terminals are made of them."""

from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import CharSet
from cadenza.decoding.constraints.limits import Effort

Ranges: TypeAlias = list[tuple[int, int]]
Edges: TypeAlias = dict[int, CharSet]
"""By the state that they lead to."""

ALL_BYTES = (1 << 256) - 1
_DEAD = -1


class Characters:
    """An automaton over bytes as one over characters: only the states between two characters."""

    def __init__(self, dfa: DFA, effort: Effort) -> None:
        self.dfa = dfa
        self._effort = effort
        self._rests: dict[tuple[int, int], dict[int, Ranges]] = {}
        self._rows = dfa.table[:, dfa.byte_class].tolist()

    @cached_property
    def states(self) -> list[int]:
        found = {0: None}
        pending = [0]
        while pending:
            state = pending.pop()
            for target in self.edges(state, ALL_BYTES):
                if target not in found:
                    found[target] = None
                    pending.append(target)
        return list(found)

    def edges(self, state: int, mask: int) -> Edges:
        """The ways by characters whose first byte is in the mask."""
        row = self._rows[state]
        found: dict[int, Ranges] = {}
        self._effort.spend(2)
        first, run_target = 0, _DEAD  # bytes that lead to the same state are one range
        for byte in range(0x81):
            target = row[byte] if byte < 0x80 and mask >> byte & 1 else _DEAD
            if target != run_target:
                if run_target != _DEAD:
                    found.setdefault(run_target, []).append((first, byte - 1))
                first, run_target = byte, target
        for byte in range(0xC2, 0xF5):
            if row[byte] >= 0 and mask >> byte & 1:
                for target, ranges in self._lead(row[byte], byte).items():
                    found.setdefault(target, []).extend(ranges)
        return {target: CharSet.of(ranges) for target, ranges in found.items()}

    def _lead(self, target: int, byte: int) -> dict[int, Ranges]:
        self._effort.spend()
        length = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
        base = (byte & (0x3F >> length)) << 6 * length
        return _shifted(self._rest(target, length), base)

    def _rest(self, state: int, length: int) -> dict[int, Ranges]:
        """The states that `length` continuation bytes lead to, with the bits that they stand for."""
        if length == 0:
            return {state: [(0, 0)]}
        known = self._rests.get((state, length))
        if known is None:
            known = self._rests[state, length] = {}
            size = 1 << 6 * (length - 1)
            for byte in range(0x80, 0xC0):
                target = self._rows[state][byte]
                if target < 0:
                    continue
                self._effort.spend()
                for end, ranges in _shifted(self._rest(target, length - 1), (byte & 0x3F) * size).items():
                    known.setdefault(end, []).extend(ranges)
            for end, ranges in known.items():
                known[end] = list(_joined(ranges))
        return known


def _shifted(ends: dict[int, Ranges], base: int) -> dict[int, Ranges]:
    return {end: [(base + low, base + high) for low, high in ranges] for end, ranges in ends.items()}


def _joined(ranges: Ranges) -> Iterable[tuple[int, int]]:
    """Neighbours made one; in ascending order already."""
    low, high = ranges[0]
    for first, last in ranges[1:]:
        if first != high + 1:
            yield low, high
            low = first
        high = last
    yield low, high
