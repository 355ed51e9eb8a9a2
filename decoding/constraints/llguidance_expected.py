"""Which terminals a parser may expect at the same place, as far as the terminals before the place tell."""

import numpy as np

from cadenza.decoding.constraints.llguidance_automata import Automata, Ints, members_of, sorted_unique
from cadenza.decoding.constraints.llguidance_context import context
from cadenza.decoding.constraints.llguidance_symbols import Symbols


class Expected:
    """Two terminals are expected at one place at the start, and after two terminals (or one) that match the same
    text and were expected at one place themselves.

    What else the parser knows is disregarded, so the answer may be yes where the truth is no, never the other way
    round. It grows while terminals are found that match the same text.
    """

    def __init__(self, symbols: Symbols, automata: Automata | None) -> None:
        leaves = context(symbols, [1 << code for code in range(len(symbols.terminals))])
        self._effort = symbols.effort
        self._follow = leaves.follow
        self._first = [0] * len(leaves.follow)
        """By terminal, the mask of the places where it is expected; a place has a first and a second side."""
        self._second = [0] * len(leaves.follow)
        self._places: dict[tuple[int, int], None] = {}
        self._num_read = 0
        self._automata = automata
        self._index = {code: index for index, code in enumerate(automata.codes if automata else ())}
        self._pairs: Ints = np.empty(0, np.int64)
        for following in {leaves.starts, *leaves.follow}:
            self._add(following, following)

    def at_one_place(self, first: int, second: int) -> bool:
        return bool(self._first[first] & self._second[second] or self._second[first] & self._first[second])

    def spread(self, together: set[tuple[int, int]]) -> None:
        """together: terminals that some same text matches. Removes those that are expected at one place."""
        while ready := {pair for pair in together if self.at_one_place(*pair)}:
            self._effort.spend(len(together) // 4)
            together -= ready
            for first, second in ready:
                self._add(self._follow[first], self._follow[second])

    def new_pairs(self) -> Ints:
        """[n, 2] indices of automata that turned out to be expected at one place and may match alike texts."""
        if self._automata is None:
            return np.empty((0, 2), np.int64)
        count = len(self._index)
        found = [np.empty(0, np.int64)]
        for first, second in list(self._places)[self._num_read :]:
            a, b = self._indices(first), self._indices(second)
            found.append(self._alike(self._automata.ends, a, b))
            if first != second:
                found.append(self._alike(self._automata.ends, b, a))
        self._num_read = len(self._places)
        fresh = np.setdiff1d(sorted_unique(np.concatenate(found)), self._pairs, assume_unique=True)
        self._pairs = np.concatenate([self._pairs, fresh])
        return np.stack([fresh // count, fresh % count], axis=1)

    def _alike(self, ends: Ints, a: Ints, b: Ints) -> Ints:
        """Pairs of one of `a` and a later one of `b` whose head begins with the former's; both ascending."""
        low, high = np.searchsorted(b, a, side="right"), np.searchsorted(b, ends[a])
        sizes = high - low
        self._effort.spend(1 + int(sizes.sum()) // 64)
        within = np.arange(int(sizes.sum())) - np.repeat(sizes.cumsum() - sizes, sizes)
        pairs: Ints = np.repeat(a, sizes) * len(self._index) + b[np.repeat(low, sizes) + within]
        return pairs

    def _indices(self, mask: int) -> Ints:
        return np.sort(
            np.array([self._index[code] for code in members_of(mask) if code in self._index], np.int64)
        )

    def _add(self, first: int, second: int) -> None:
        if (first, second) in self._places:
            return
        place = 1 << len(self._places)
        self._places[first, second] = None
        for codes, sides in ((first, self._first), (second, self._second)):
            for code in members_of(codes):
                sides[code] |= place
        self._effort.spend(1 + (first | second).bit_count() // 8)
