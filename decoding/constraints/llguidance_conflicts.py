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

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.llguidance_context import context
from cadenza.decoding.constraints.llguidance_symbols import Symbols, byte_mask, mask_bytes

Ints = NDArray[np.int64]
_MAX_PAIRS = 1_000_000
_CHUNK = 1 << 14


@dataclass(slots=True)
class Findings:
    """Terminals by their code; places are states of an automaton, or offsets in a literal."""

    conflicts: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    """(T, T'): by place in T' the mask of bytes b."""
    together: set[tuple[int, int]] = field(default_factory=set)
    """Terminals that some same text matches."""

    def conflict(self, ended: int, longer: int, place: int, mask: int) -> None:
        places = self.conflicts.setdefault((ended, longer), {})
        places[place] = places.get(place, 0) | mask


def cuts(symbols: Symbols) -> dict[int, dict[int, int]]:
    """By terminal that is to be cut: by place, the mask of the bytes before which it must not go on in one lexeme."""
    follow = context(symbols, [terminal.first_bytes() for terminal in symbols.terminals]).follow
    findings = Findings()
    automata = _Automata.of(symbols, follow)
    literals = _literals(symbols)
    _among_literals(symbols, literals, follow, findings)
    if automata.codes:
        _single(automata, findings)
        _pairs(symbols, automata, findings)
        _with_literals(symbols, literals, follow, automata, findings)
    if not findings.conflicts:
        return {}
    found: dict[int, dict[int, int]] = {}
    expected = _Expected(symbols, findings)
    for (ended, longer), places in findings.conflicts.items():
        if expected.at_one_place(ended, longer):
            merged = found.setdefault(longer, {})
            for place, mask in places.items():
                merged[place] = merged.get(place, 0) | mask
    return found


class _Expected:
    """Which terminals may be expected at the same place.

    They are at the start, and after two terminals (or one) that match the same text and were themselves expected at
    the same place. What else the parser knows there is disregarded, so the answer may be yes where the truth is no,
    never the other way round.
    """

    def __init__(self, symbols: Symbols, findings: Findings) -> None:
        leaves = context(symbols, [1 << code for code in range(len(symbols.terminals))])
        self._follow = leaves.follow
        self._first = [0] * len(leaves.follow)
        """By terminal, the mask of the places where it is expected; a place has a first and a second side."""
        self._second = [0] * len(leaves.follow)
        self._num_places = 0
        self._effort = symbols.effort
        for following in {leaves.starts, *leaves.follow}:
            self._add(following, following)
        self._spread(findings.together)

    def at_one_place(self, first: int, second: int) -> bool:
        return bool(self._first[first] & self._second[second] or self._second[first] & self._first[second])

    def _add(self, first: int, second: int) -> None:
        place = 1 << self._num_places
        self._num_places += 1
        for codes, sides in ((first, self._first), (second, self._second)):
            for code in _members(codes):
                sides[code] |= place
        self._effort.spend(1 + (first | second).bit_count() // 8)

    def _spread(self, together: set[tuple[int, int]]) -> None:
        waiting = together
        while True:
            ready = {pair for pair in waiting if self.at_one_place(*pair)}
            if not ready:
                return
            waiting = waiting - ready
            for first, second in {(self._follow[a], self._follow[b]) for a, b in ready}:
                self._add(first, second)


def _members(mask: int) -> list[int]:
    data = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), np.uint8)
    members: list[int] = np.flatnonzero(np.unpackbits(data, bitorder="little")).tolist()
    return members


@dataclass(frozen=True, slots=True)
class _Automata:
    """The terminals that are not literals, as one automaton with several starts."""

    codes: list[int]
    starts: Ints
    owner: Ints
    """[state] index into codes."""
    table: NDArray[np.int32]
    """[state, class]."""
    accepting: NDArray[np.bool_]
    byte_class: NDArray[np.intp]
    follow: NDArray[np.bool_]
    """[index, class] whether some byte of the class may follow the terminal."""
    follow_bytes: list[int]

    @classmethod
    def of(cls, symbols: Symbols, follow: list[int]) -> "_Automata":
        codes = [code for code, terminal in enumerate(symbols.terminals) if terminal.dfa is not None]
        dfas = [dfa for terminal in symbols.terminals if (dfa := terminal.dfa) is not None]
        if not dfas:
            empty = np.empty(0, np.int64)
            none = np.empty((0, 0), np.bool_)
            return cls([], empty, empty, none.astype(np.int32), none[0:0, 0:0].reshape(-1), empty, none, [])
        sizes = np.array([dfa.num_states for dfa in dfas])
        symbols.effort.check_states(int(sizes.sum()))
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        classes: Ints = np.zeros(256, np.int64)
        for dfa in dfas:
            symbols.effort.spend(16)
            classes = np.unique(classes * 256 + dfa.byte_class, return_inverse=True)[1].reshape(-1)
        example = np.unique(classes, return_index=True)[1]
        parts = []
        for dfa, start in zip(dfas, starts, strict=True):
            symbols.effort.spend(1 + dfa.num_states // 8)
            part = dfa.table[:, dfa.byte_class[example]]
            parts.append(np.where(part >= 0, part + start, -1))
        masks = [follow[code] for code in codes]
        follow_class = np.zeros((len(codes), len(example)), np.bool_)
        for index, mask in enumerate(masks):
            follow_class[index, classes[mask_bytes(mask)]] = True
        return cls(
            codes,
            starts,
            np.repeat(np.arange(len(codes)), sizes),
            np.concatenate(parts).astype(np.int32),
            np.concatenate([dfa.accepting for dfa in dfas]),
            classes.astype(np.intp),
            follow_class,
            masks,
        )

    def report(self, ended: Ints, longer: Ints, findings: Findings) -> None:
        """ended, longer: states that one text leads to. A conflict where the first is complete."""
        complete = self.accepting[ended]
        ended, longer = ended[complete], longer[complete]
        both = self.follow[self.owner[ended]] & (self.table[longer] >= 0)
        for row in np.flatnonzero(both.any(axis=1)):
            state = int(longer[row])
            first, second = int(self.owner[ended[row]]), int(self.owner[state])
            mask = byte_mask(both[row][self.byte_class].nonzero()[0].tolist())
            place = state - int(self.starts[second])
            findings.conflict(self.codes[first], self.codes[second], place, mask & self.follow_bytes[first])


def _single(automata: _Automata, findings: Findings) -> None:
    """A terminal that goes on where it could have ended."""
    states = np.arange(len(automata.owner))
    automata.report(states, states, findings)


def _pairs(symbols: Symbols, automata: _Automata, findings: Findings) -> None:
    """All pairs of states of two terminals that one text leads to."""
    count, width = len(automata.codes), np.int64(len(automata.owner))
    first, second = np.triu_indices(count, 1)
    fresh = automata.starts[first] * width + automata.starts[second]
    seen = fresh
    while len(fresh):
        reached = []
        for chunk in range(0, len(fresh), _CHUNK):
            pairs = fresh[chunk : chunk + _CHUNK]
            symbols.effort.spend(8 + len(pairs) // 2)
            a, b = pairs // width, pairs % width
            automata.report(a, b, findings)
            automata.report(b, a, findings)
            both = automata.accepting[a] & automata.accepting[b]
            owners = automata.owner[a[both]] * np.int64(count) + automata.owner[b[both]]
            for owner in np.unique(owners).tolist():
                findings.together.add((automata.codes[owner // count], automata.codes[owner % count]))
            following_a, following_b = automata.table[a].astype(np.int64), automata.table[b]
            reached.append(
                np.unique((following_a * width + following_b)[(following_a >= 0) & (following_b >= 0)])
            )
        fresh = np.unique(np.concatenate(reached))
        fresh = fresh[~np.isin(fresh, seen, assume_unique=True)]
        seen = np.concatenate([seen, fresh])
        if len(seen) > _MAX_PAIRS:
            raise ConstraintTooComplex("the constraint has too many terminals that match alike texts")


def _literals(symbols: Symbols) -> list[tuple[bytes, int]]:
    return sorted((t.text, code) for code, t in enumerate(symbols.terminals) if t.dfa is None)


def _among_literals(
    symbols: Symbols, literals: list[tuple[bytes, int]], follow: list[int], findings: Findings
) -> None:
    """Literals that are beginnings of others."""
    beginnings: list[tuple[bytes, int]] = []
    for text, code in literals:
        symbols.effort.spend()
        while beginnings and not text.startswith(beginnings[-1][0]):
            beginnings.pop()
        for shorter, other in beginnings:
            symbols.effort.spend()
            bit = 1 << text[len(shorter)]
            if follow[other] & bit:
                findings.conflict(other, code, len(shorter), bit)
        beginnings.append((text, code))


def _with_literals(
    symbols: Symbols,
    literals: list[tuple[bytes, int]],
    follow: list[int],
    automata: _Automata,
    findings: Findings,
) -> None:
    """Walks all literals and all automata together, a tree of the literals' beginnings level by level."""
    live: list[tuple[list[tuple[bytes, int]], Ints]] = [(literals, automata.starts)]
    depth = 0
    while live:
        following: list[tuple[list[tuple[bytes, int]], Ints]] = []
        for group, states in live:
            _report_group(group, states, depth, follow, automata, findings)
            for byte, longer in _by_byte(group, depth):
                symbols.effort.spend(4 + len(states) // 16)
                reached = automata.table[states, automata.byte_class[byte]].astype(np.int64)
                reached = reached[reached >= 0]
                if len(reached):
                    following.append((longer, reached))
        live = following
        depth += 1


def _by_byte(group: list[tuple[bytes, int]], depth: int) -> Iterator[tuple[int, list[tuple[bytes, int]]]]:
    begins = [i for i, (text, _) in enumerate(group) if len(text) > depth]
    bounds = [begins[0]] if begins else []
    bounds += [i for i in begins[1:] if group[i][0][depth] != group[i - 1][0][depth]]
    for low, high in pairwise([*bounds, len(group)]):
        yield group[low][0][depth], group[low:high]


def _report_group(
    group: list[tuple[bytes, int]],
    states: Ints,
    depth: int,
    follow: list[int],
    automata: _Automata,
    findings: Findings,
) -> None:
    """group: literals that begin alike; states: where their first `depth` bytes lead."""
    complete = states[automata.accepting[states]]
    ended = [code for text, code in group[:1] if len(text) == depth]
    for code in ended:
        for state in complete.tolist():
            findings.together.add((code, automata.codes[automata.owner[state]]))
        alive = automata.table[states] >= 0
        for state, row in zip(states.tolist(), list(alive), strict=True):
            owner = int(automata.owner[state])
            mask = follow[code] & byte_mask(row[automata.byte_class].nonzero()[0].tolist())
            if mask:
                findings.conflict(code, automata.codes[owner], state - int(automata.starts[owner]), mask)
    for state in complete.tolist():
        owner = int(automata.owner[state])
        for text, code in group[len(ended) :]:
            if automata.follow_bytes[owner] >> text[depth] & 1:
                findings.conflict(automata.codes[owner], code, depth, 1 << text[depth])
