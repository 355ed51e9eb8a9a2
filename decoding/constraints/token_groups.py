"""The tokens of a vocabulary through the eyes of one automaton: those that do the same to every state are one group.

What a token does is a function from states to states. Tokens with the same function are alike for the constraint,
and so is whatever follows them: the trie of the vocabulary is followed function by function instead of token by
token. For `[a-z]+` a vocabulary of 49,152 has one group; for `.{0,200}`, about a hundred. (The functions are the part
of the automaton's transition monoid that tokens can spell.) Knows nothing of what is accepted.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.token_trie import TokenTrie

_MAX_PAIRS = 2_000_000
"""Pairs of all functions together: what must be held."""
_PAIRS_AT_ONCE = 1 << 18
_PAIRS_PER_STEP = 64
"""Pairs followed in the time of one unit of effort, about."""

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """The groups, and where each leads: an edge goes from a state by a group to a state."""

    of_token: Ints
    """[num_tokens] the group of each id; 0 for those that are never possible."""
    num_groups: int
    """The one that is never possible included."""
    group: Ints
    """[num_edges], rising."""
    origin: Ints
    target: Ints

    @classmethod
    def build(cls, trie: TokenTrie, dfa: DFA, effort: Effort) -> "TokenGroups":
        found = _Functions()
        start = np.arange(dfa.num_states, dtype=np.int32)
        level = _Level(np.array([0, dfa.num_states]), start, start)
        place = np.full(trie.num_nodes, -1, np.int32)  # of the node's function in its level
        place[0] = 0
        group = np.zeros(trie.num_nodes, np.int32)
        num_classes = dfa.table.shape[1]
        for first, end in pairwise(trie.level_start[1:].tolist()):
            above = place[trie.parent[first:end]].astype(np.int64)
            live = np.flatnonzero(above >= 0)
            if not len(live):
                break
            label = dfa.byte_class[trie.byte[first:end]][live]
            steps, step = _distinct(above[live] * num_classes + label)
            level, places, groups = level.follow(steps, dfa.table, found, effort)
            place[first + live] = places[step]
            group[first + live] = groups[step]
        return found.groups(group[trie.token_node])


@dataclass(slots=True)
class _Functions:
    """Every function once, numbered from 1."""

    origins: list[Ints] = field(default_factory=list)
    targets: list[Ints] = field(default_factory=list)
    numbers: dict[bytes | int, int] = field(default_factory=dict)
    num_pairs: int = 0

    def number(self, key: bytes | int, origin: Ints, target: Ints) -> int:
        known = self.numbers.get(key)
        if known is not None:
            return known
        self.num_pairs += len(origin)
        if self.num_pairs > _MAX_PAIRS:
            raise ConstraintTooComplex(
                f"the constraint's automaton over tokens has more than {_MAX_PAIRS} transitions"
            )
        self.origins.append(origin.copy())
        self.targets.append(target.copy())
        self.numbers[key] = len(self.origins)
        return len(self.origins)

    def groups(self, of_token: Ints) -> TokenGroups:
        """Only the functions of whole tokens."""
        used, renumbered = _distinct(np.append(of_token, 0))
        numbers = used[1:].tolist()
        lengths = [len(self.origins[number - 1]) for number in numbers]
        none = [np.zeros(0, np.int32)]
        return TokenGroups(
            renumbered[:-1].astype(np.int32),
            len(used),
            np.repeat(np.arange(1, len(used), dtype=np.int32), lengths),
            np.concatenate([self.origins[number - 1] for number in numbers] or none),
            np.concatenate([self.targets[number - 1] for number in numbers] or none),
        )


@dataclass(frozen=True, slots=True)
class _Level:
    """The functions of all prefixes of one length, as lists of pairs side by side."""

    start: NDArray[np.int64]
    """[num_functions + 1]."""
    origin: Ints
    target: Ints

    def follow(
        self, steps: NDArray[np.int64], table: Ints, found: _Functions, effort: Effort
    ) -> "tuple[_Level, Ints, Ints]":
        """steps: a function of this level and a class of bytes, each. Answers the next level, and for each step its
        place there, -1 if it leads nowhere, and its number."""
        functions, label = np.divmod(steps, table.shape[1])
        size = self.start[functions + 1] - self.start[functions]
        place_of: dict[int, int] = {}
        numbers: list[int] = []
        for begin, end in _portions(size):
            effort.spend(end - begin + int(size[begin:end].sum()) // _PAIRS_PER_STEP)
            pairs = self._compose(functions[begin:end], size[begin:end], label[begin:end], table)
            for key, origin, target in _pieces(*pairs, end - begin):
                numbers.append(0 if key is None else found.number(key, origin, target))
        for number in numbers:
            if number:
                place_of.setdefault(number, len(place_of))
        places = [place_of[number] if number else -1 for number in numbers]
        origins = [found.origins[number - 1] for number in place_of]
        targets = [found.targets[number - 1] for number in place_of]
        start = np.cumsum([0, *map(len, origins)])
        none = [np.zeros(0, np.int32)]
        level = _Level(start, np.concatenate(origins or none), np.concatenate(targets or none))
        return level, np.array(places, np.int32), np.array(numbers, np.int32)

    def _compose(
        self, function: NDArray[np.int64], size: NDArray[np.int64], label: NDArray[np.int64], table: Ints
    ) -> tuple[NDArray[np.int64], Ints, Ints]:
        """For each step the pairs of its function, one byte further: which step, where from, where to."""
        step = np.repeat(np.arange(len(function)), size)
        pair = np.arange(len(step)) + np.repeat(self.start[function] - (np.cumsum(size) - size), size)
        target = table[self.target[pair], label[step]]
        live = np.flatnonzero(target >= 0)
        return step[live], self.origin[pair[live]], target[live]


def _pieces(
    step: NDArray[np.int64], origin: Ints, target: Ints, num_steps: int
) -> "list[tuple[bytes | int | None, Ints, Ints]]":
    """What each step leads to, with a key that only equal functions share; None for nothing."""
    bounds = np.searchsorted(step, np.arange(num_steps + 1)).tolist()
    packed = origin.astype(np.int64) << 32 | target
    pieces: list[tuple[bytes | int | None, Ints, Ints]] = []
    for begin, end in pairwise(bounds):
        key: bytes | int | None = None
        if end == begin + 1:
            key = int(packed[begin])
        elif end > begin:
            key = blake2b(packed[begin:end].tobytes(), digest_size=16).digest()
        pieces.append((key, origin[begin:end], target[begin:end]))
    return pieces


def _portions(size: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Neighbouring steps that are followed at once, so that memory and the time between two looks at the clock are
    bounded."""
    portion = np.cumsum(size + _PAIRS_PER_STEP) // _PAIRS_AT_ONCE
    bounds = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(size)]
    return list(pairwise(bounds))


def _distinct(keys: NDArray[np.int64] | Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Like numpy's unique with return_inverse; without sorting where the keys are small."""
    highest = int(keys.max())
    if highest > 8 * len(keys) + 1024:
        values, place = np.unique(keys.astype(np.int64), return_inverse=True)
        return values, place
    present = np.zeros(highest + 1, np.bool_)
    present[keys] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[keys]
