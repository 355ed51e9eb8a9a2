"""Where llguidance's lexer would lose texts of a grammar whose terminals may match anything they can.

Its lexer is greedy across all terminals that the grammar allows at a place: a match of terminal T that ends before
byte b is forgotten if any other match can go on with b. So a text is lost only if b may also begin what follows T.
A conflict is such a place: terminal T' (T itself perhaps) can go on with b at a state where T is complete and may
be followed by b. A grammar without conflicts means the same to the lexer as to us; terminals that are complete at
the same place are all kept.

Literals are walked as one tree, other terminals as one table of all their automata, pairs of states at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_automata import Automata, Ints, byte_mask, sorted_unique
from cadenza.decoding.constraints.llguidance_context import context
from cadenza.decoding.constraints.llguidance_expected import Expected
from cadenza.decoding.constraints.llguidance_symbols import Symbols

Texts: TypeAlias = list[tuple[bytes, int]]
"""Literals with their terminals, sorted."""

_MAX_CONFLICTS = 200_000
_MAX_PAIRS = 1_000_000
_TOO_MANY = "the constraint has too many terminals that match alike texts"
_CHUNK = 1 << 14


def cuts(symbols: Symbols) -> dict[int, dict[int, int]]:
    """By terminal that is to be cut: by place, the mask of the bytes before which it must not go on in one lexeme."""
    walk = _Walk.of(symbols)
    expected = Expected(symbols, walk.automata)
    walk.among_literals()
    walk.single()
    walk.literals_and_automata()
    expected.spread(walk.together)
    while len(pairs := expected.new_pairs()):
        walk.pairs(pairs)
        expected.spread(walk.together)
    found: dict[int, dict[int, int]] = {}
    for (ended, longer, place), mask in walk.conflicts.items():
        if expected.at_one_place(ended, longer):
            places = found.setdefault(longer, {})
            places[place] = places.get(place, 0) | mask
    return found


@dataclass(slots=True)
class _Walk:
    """Walks terminals side by side. Places are states of an automaton, or offsets in a literal."""

    effort: Effort
    follow: list[int]
    """By terminal, the mask of the bytes that may come after it."""
    texts: Texts
    automata: Automata | None
    conflicts: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(T, T', place in T'): the mask of bytes b."""
    together: set[tuple[int, int]] = field(default_factory=set)
    """Terminals that some same text matches."""
    seen: Ints = field(default_factory=lambda: np.array([np.iinfo(np.int64).max]))
    """Pairs of states, ascending, and a number behind all of them."""

    @classmethod
    def of(cls, symbols: Symbols) -> "_Walk":
        follow = context(symbols, [terminal.first_bytes() for terminal in symbols.terminals]).follow
        texts = sorted((t.text, code) for code, t in enumerate(symbols.terminals) if t.dfa is None)
        dfas = {code: t.dfa for code, t in enumerate(symbols.terminals) if t.dfa is not None}
        automata = Automata.of(dfas, follow, symbols.effort) if dfas else None
        return cls(symbols.effort, follow, texts, automata)

    def _conflict(self, ended: int, longer: int, place: int, mask: int) -> None:
        key = (ended, longer, place)
        self.conflicts[key] = self.conflicts.get(key, 0) | mask
        if len(self.conflicts) > _MAX_CONFLICTS:
            raise ConstraintTooComplex(_TOO_MANY)

    def among_literals(self) -> None:
        """Literals that are beginnings of others."""
        beginnings: Texts = []
        for text, code in self.texts:
            self.effort.spend()
            while beginnings and not text.startswith(beginnings[-1][0]):
                beginnings.pop()
            for shorter, other in beginnings:
                self.effort.spend()
                bit = 1 << text[len(shorter)]
                if self.follow[other] & bit:
                    self._conflict(other, code, len(shorter), bit)
            beginnings.append((text, code))

    def single(self) -> None:
        """Terminals that can go on where they could have ended."""
        if self.automata:
            states = np.arange(len(self.automata.owner))
            self._ended(self.automata, states, states)

    def pairs(self, pairs: Ints) -> None:
        """All states of two terminals that one text leads to. pairs: [n, 2] indices of automata."""
        automata = self.automata
        assert automata is not None
        width = np.int64(len(automata.owner))
        fresh = sorted_unique(automata.starts[pairs[:, 0]] * width + automata.starts[pairs[:, 1]])
        while len(fresh):
            places = np.searchsorted(self.seen, fresh)
            unknown = self.seen[places] != fresh
            places, fresh = places[unknown], fresh[unknown]
            self.seen = np.insert(self.seen, places, fresh)
            if len(self.seen) > _MAX_PAIRS:
                raise ConstraintTooComplex(_TOO_MANY)
            chunks = range(0, len(fresh), _CHUNK)
            reached = [self._step(automata, fresh[chunk : chunk + _CHUNK]) for chunk in chunks]
            fresh = sorted_unique(np.concatenate([np.empty(0, np.int64), *reached]))

    def _step(self, automata: Automata, pairs: Ints) -> Ints:
        """Look at pairs of states; answers those that the next byte leads to."""
        self.effort.spend(8 + len(pairs) // 2)
        width = np.int64(len(automata.owner))
        a, b = pairs // width, pairs % width
        self._ended(automata, a, b)
        self._ended(automata, b, a)
        both = automata.accepting[a] & automata.accepting[b]
        count = len(automata.codes)
        for owners in sorted_unique(automata.owner[a[both]] * count + automata.owner[b[both]]).tolist():
            self.together.add((automata.codes[owners // count], automata.codes[owners % count]))
        to_a, to_b = automata.table[a].astype(np.int64), automata.table[b]
        return sorted_unique((to_a * width + to_b)[(to_a >= 0) & (to_b >= 0)])

    def _ended(self, automata: Automata, ended: Ints, longer: Ints) -> None:
        """States that one text leads to. A conflict where the first is complete and what may follow it goes on."""
        complete = automata.accepting[ended]
        ended, longer = ended[complete], longer[complete]
        goes_on = automata.follow[automata.owner[ended]] & (automata.table[longer] >= 0)
        for row in np.flatnonzero(goes_on.any(axis=1)):
            first, second = automata.owner[ended[row]], automata.owner[longer[row]]
            mask = byte_mask(np.flatnonzero(goes_on[row][automata.byte_class]).tolist())
            code = automata.codes[first]
            place = int(longer[row] - automata.starts[second])
            self._conflict(code, automata.codes[second], place, mask & self.follow[code])

    def literals_and_automata(self) -> None:
        """A tree of the literals' beginnings, level by level, with the states that each beginning leads to."""
        automata = self.automata
        live: list[tuple[Texts, Ints]] = [(self.texts, automata.starts)] if automata and self.texts else []
        depth = 0
        while live and automata:
            following: list[tuple[Texts, Ints]] = []
            for group, states in live:
                if depth:
                    self._group(automata, group, states, depth)
                for byte, longer in _by_byte(group, depth):
                    self.effort.spend(4 + len(states) // 16)
                    reached = automata.table[states, automata.byte_class[byte]].astype(np.int64)
                    if len(reached := reached[reached >= 0]):
                        following.append((longer, reached))
            live = following
            depth += 1

    def _group(self, automata: Automata, group: Texts, states: Ints, depth: int) -> None:
        """group: literals that begin alike; states: where their first `depth` bytes lead."""
        owners = [automata.codes[owner] for owner in automata.owner[states].tolist()]
        accepting = automata.accepting[states].tolist()
        if len(group[0][0]) == depth:
            code, group = group[0][1], group[1:]
            alive: NDArray[np.bool_] = automata.table[states] >= 0
            for owner, state, row, complete in zip(owners, states.tolist(), alive, accepting, strict=True):
                mask = self.follow[code] & byte_mask(np.flatnonzero(row[automata.byte_class]).tolist())
                if mask:
                    self._conflict(code, owner, state - int(automata.starts[automata.owner[state]]), mask)
                if complete:
                    self.together.add((code, owner))
        for owner, complete in zip(owners, accepting, strict=True):
            for text, code in group if complete else ():
                self.effort.spend()
                if self.follow[owner] >> text[depth] & 1:
                    self._conflict(owner, code, depth, 1 << text[depth])


def _by_byte(group: Texts, depth: int) -> Iterator[tuple[int, Texts]]:
    begins = [i for i, (text, _) in enumerate(group) if len(text) > depth]
    bounds = [i for i in begins if i == begins[0] or group[i][0][depth] != group[i - 1][0][depth]]
    for low, high in pairwise([*bounds, len(group)]):
        yield group[low][0][depth], group[low:high]
