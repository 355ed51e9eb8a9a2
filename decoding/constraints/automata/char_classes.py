"""The alphabet of one expression: characters that no part of it tells apart form one class.

Automata are built over these classes and know nothing of bytes; `utf8` turns them into bytes at the end.
"""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.expression import CharSet
from cadenza.decoding.constraints.limits import Effort

NO_CLASS = -1
"""What surrogates belong to: they are not characters."""
_SURROGATES_START, _SURROGATES_END = 0xD800, 0xE000
_END = 0x110000


class CharClasses:
    """A partition of the Unicode characters: class `ids[i]` from code point `starts[i]` up to the next start."""

    def __init__(self, char_sets: Iterable[CharSet], characters: Iterable[str], effort: Effort) -> None:
        distinct = list(dict.fromkeys(char_sets))
        singles = sorted({ord(c) for c in characters})
        points = {0, _SURROGATES_START, _SURROGATES_END}
        for char_set in distinct:
            effort.spend(1 + len(char_set.ranges) // 8)
            for first, last in char_set.ranges:
                points.add(first)
                points.add(last + 1)
        points.update(singles)
        points.update(code + 1 for code in singles)
        points.discard(_END)
        self._points = np.array(sorted(points), np.int64)
        self._ids = self._partition(distinct, singles, effort)
        self._members: dict[CharSet, tuple[int, ...]] = {}
        self._of_char: dict[str, int] = {}

    def _partition(self, char_sets: list[CharSet], singles: list[int], effort: Effort) -> NDArray[np.int64]:
        ids = np.zeros(len(self._points), np.int64)
        for char_set in char_sets:
            effort.spend(16)
            ids = np.unique(ids * 2 + self._inside(char_set), return_inverse=True)[1].reshape(-1)
        ids[np.searchsorted(self._points, singles)] = len(self._points) + np.arange(len(singles))
        ids[np.searchsorted(self._points, _SURROGATES_START)] = NO_CLASS
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        number = np.empty(len(first), np.int64)
        number[np.argsort(first)] = np.arange(len(first))
        number = number[inverse.reshape(-1)]
        surrogates = number[np.searchsorted(self._points, _SURROGATES_START)]
        number[number > surrogates] -= 1
        number[np.searchsorted(self._points, _SURROGATES_START)] = NO_CLASS
        return number

    def _inside(self, char_set: CharSet) -> NDArray[np.int64]:
        change = np.zeros(len(self._points) + 1, np.int64)
        ranges = np.array(char_set.ranges, np.int64).reshape(-1, 2)
        change[np.searchsorted(self._points, ranges[:, 0])] += 1
        change[np.searchsorted(self._points, ranges[:, 1] + 1)] -= 1
        return change[:-1].cumsum()

    @cached_property
    def count(self) -> int:
        return int(self._ids.max()) + 1

    @cached_property
    def all(self) -> tuple[int, ...]:
        return tuple(range(self.count))

    @cached_property
    def intervals(self) -> list[tuple[int, int, int]]:
        """(first, last, class), ascending, surrogates left out."""
        ends = [*(self._points[1:] - 1).tolist(), _END - 1]
        zipped = zip(self._points.tolist(), ends, self._ids.tolist(), strict=True)
        return [(first, last, number) for first, last, number in zipped if number != NO_CLASS]

    def of(self, char_set: CharSet) -> tuple[int, ...]:
        """The classes that the set consists of; the set is one of those that the partition was made for."""
        members = self._members.get(char_set)
        if members is None:
            found = np.unique(self._ids[self._inside(char_set) > 0])
            members = self._members[char_set] = tuple(found[found != NO_CLASS].tolist())
        return members

    def of_char(self, character: str) -> tuple[int, ...]:
        number = self._of_char.get(character)
        if number is None:
            place = np.searchsorted(self._points, ord(character), side="right") - 1
            number = self._of_char[character] = int(self._ids[place])
        return (number,)
