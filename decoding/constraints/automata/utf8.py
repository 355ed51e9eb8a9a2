"""Automata over character classes to automata over the bytes of UTF-8.

The idea of Russ Cox's and BurntSushi's utf8-ranges, for all classes at once: one shared diagram tells the class of
a character from its bytes; each state then gets its own copy of the parts where its classes lead to different
states, equal copies being one. What comes out is minimal if what went in was: a state inside a character cannot
equal one that is at another distance from the character's end.
"""

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.char_classes import CharClasses
from cadenza.decoding.constraints.automata.char_dfa import CharDFA
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.limits import Effort

Segment = tuple[int, int, int]
"""First byte, last byte, where they lead: a class or state at the end of a character, else a node."""
_LEADS = (
    # continuation bytes after it, first lead byte, last, code points from, to
    (1, 0xC0, 0xDF, 0x80, 0x7FF),
    (2, 0xE0, 0xEF, 0x800, 0xFFFF),
    (3, 0xF0, 0xF7, 0x10000, 0x10FFFF),
)
_DEAD = -1


class _Diagram:
    """From bytes to classes: a node has segments, and the classes found under it. Equal nodes are one."""

    def __init__(self, classes: CharClasses, effort: Effort) -> None:
        self._effort = effort
        self._ids: dict[tuple[int, tuple[Segment, ...]], int] = {}
        self.segments: list[tuple[Segment, ...]] = []
        self.depth: list[int] = []
        """Bytes from the node to the end of the character."""
        self.classes: list[frozenset[int]] = []
        self.ascii: list[Segment] = [(a, min(b, 0x7F), c) for a, b, c in classes.intervals if a < 0x80]
        self.leads: list[Segment] = []
        for depth, first, last, low, high in _LEADS:
            clipped = [
                (max(a, low), min(b, high), c) for a, b, c in classes.intervals if a <= high and b >= low
            ]
            self._starts = [a for a, _, _ in clipped]
            self._clipped = clipped
            self.leads += self._segments(0, depth, first, last)

    def _segments(self, base: int, depth: int, first: int, last: int) -> list[Segment]:
        """What the bytes first..last lead to when the first of them stands for code points from `base` on."""
        size = 64**depth
        found: list[Segment] = []
        byte = first
        while byte <= last:
            self._effort.spend()
            low = base + (byte - first) * size
            char_class, end = self._interval(low)
            uniform = min((end + 1 - low) // size, last + 1 - byte)
            if uniform >= 1:
                child = self._uniform(char_class, depth)
                following = byte + uniform
            else:
                child = self._node(depth, self._segments(low, depth - 1, 0x80, 0xBF))
                following = byte + 1
            if child != _DEAD:
                _append(found, (byte, following - 1, child))
            byte = following
        return found

    def _interval(self, code: int) -> tuple[int, int]:
        """The class at a code point and the last one of its interval; dead where there is none."""
        place = bisect_right(self._starts, code) - 1
        if place >= 0 and code <= self._clipped[place][1]:
            return self._clipped[place][2], self._clipped[place][1]
        following = self._starts[place + 1] - 1 if place + 1 < len(self._starts) else 64**4
        return _DEAD, following

    def _uniform(self, char_class: int, depth: int) -> int:
        child = char_class
        for level in range(1, depth + 1):
            child = self._node(level, [(0x80, 0xBF, child)]) if child != _DEAD else _DEAD
        return child

    def _node(self, depth: int, segments: list[Segment]) -> int:
        if not segments:
            return _DEAD
        key = (depth, tuple(segments))
        number = self._ids.get(key)
        if number is None:
            number = self._ids[key] = len(self.segments)
            self.segments.append(key[1])
            self.depth.append(depth)
            below = {child for _, _, child in segments}
            under = below if depth == 1 else set().union(*(self.classes[child] for child in below))
            self.classes.append(frozenset(under))
        return number


class _Expansion:
    """States of the automaton over bytes: those over classes under their old numbers, then those inside characters."""

    def __init__(self, num_states: int, diagram: _Diagram, effort: Effort) -> None:
        self._diagram = diagram
        self._effort = effort
        self._copies: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._ids: dict[tuple[Segment, ...], int] = {}
        self._num_outer = num_states
        self._beyond_ascii = frozenset(c for _, _, node in diagram.leads for c in diagram.classes[node])
        self.inner: list[tuple[Segment, ...]] = []

    def segments(self, row: dict[int, int]) -> list[Segment]:
        found: list[Segment] = []
        for first, last, char_class in self._diagram.ascii:
            if char_class in row:
                _append(found, (first, last, row[char_class]))
        if self._beyond_ascii.isdisjoint(row):
            return found
        for first, last, node in self._diagram.leads:
            child = self._copy(node, row)
            if child != _DEAD:
                _append(found, (first, last, child))
        return found

    def _copy(self, node: int, row: dict[int, int]) -> int:
        """The node with this row's targets in place of classes."""
        under = self._diagram.classes[node]
        if len(row) < len(under):
            live = tuple([(number, row[number]) for number in row if number in under])
        else:
            live = tuple([(number, row[number]) for number in under if number in row])
        if not live:
            return _DEAD
        key = (node, live)
        known = self._copies.get(key)
        if known is None:
            known = self._copies[key] = self._new(node, row)
        return known

    def _new(self, node: int, row: dict[int, int]) -> int:
        found: list[Segment] = []
        ends_character = self._diagram.depth[node] == 1
        segments = self._diagram.segments[node]
        self._effort.spend(1 + len(segments) // 4)
        for first, last, child in segments:
            target = row.get(child, _DEAD) if ends_character else self._copy(child, row)
            if target != _DEAD:
                _append(found, (first, last, target))
        key = tuple(found)
        number = self._ids.get(key)
        if number is None:
            number = self._ids[key] = self._num_outer + len(self.inner)
            self.inner.append(key)
            self._effort.check_states(number + 1)
        return number


def to_bytes(dfa: CharDFA, classes: CharClasses, effort: Effort) -> DFA:
    expansion = _Expansion(len(dfa.rows), _Diagram(classes, effort), effort)
    rows: list[list[Segment] | tuple[Segment, ...]] = []
    for row in dfa.rows:
        effort.spend(1 + len(row) // 4)
        rows.append(expansion.segments(row))
    rows += expansion.inner
    accepting = np.zeros(len(rows), np.bool_)
    accepting[: len(dfa.rows)] = dfa.accepting
    byte_class, table = _table(rows, effort)
    return DFA(byte_class, table, accepting)


def _table(
    rows: list[list[Segment] | tuple[Segment, ...]], effort: Effort
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Segments to a dense table whose columns are all different."""
    cuts = sorted({0, *(s[0] for row in rows for s in row), *(s[1] + 1 for row in rows for s in row)} - {256})
    columns = {byte: column for column, byte in enumerate([*cuts, 256])}
    table = np.full((len(rows), len(cuts)), _DEAD, np.int32)
    for state, row in enumerate(rows):
        effort.spend(1 + len(row) // 4)
        for first, last, target in row:
            table[state, columns[first] : columns[last + 1]] = target
    distinct: dict[bytes, int] = {}
    class_of_column = [distinct.setdefault(table[:, c].tobytes(), len(distinct)) for c in range(len(cuts))]
    kept = [class_of_column.index(number) for number in range(len(distinct))]
    widths = np.diff([*cuts, 256])
    byte_class = np.repeat(np.array(class_of_column, np.uint8), widths)
    return byte_class, np.ascontiguousarray(table[:, kept])


def _append(segments: list[Segment], segment: Segment) -> None:
    """Keeps ascending segments in their one normal form: neighbours that lead to the same are one."""
    if segments and segments[-1][2] == segment[2] and segments[-1][1] + 1 == segment[0]:
        segments[-1] = (segments[-1][0], segment[1], segment[2])
    else:
        segments.append(segment)
