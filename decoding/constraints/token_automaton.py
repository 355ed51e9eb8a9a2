"""A finite constraint as an exact automaton over the tokens of one vocabulary.

Its states are those of the automaton over bytes. Knows which tokens may come next in each state, where they lead,
and from each state the fewest tokens to a complete text; nothing of requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.token_cache import MaskCache
from cadenza.decoding.constraints.token_groups import Edges, Ints, TokenGroups
from cadenza.decoding.constraints.vocabulary import Vocabulary

_MAX_PAIRS = 4_000_000
"""Pairs of a state and one that a token leads to: what the search for distances must hold."""
_MAX_STORED_EDGES = 1_000_000
_COMPACT_EVERY = 2_000_000

_masks = MaskCache()
"""Shared by all automata of the process, so that their number does not matter."""


@dataclass(frozen=True)
class FiniteAutomaton:
    """Picklable; shared between threads. No edge leads to a state from which no tokens complete the text."""

    dfa: DFA
    groups: TokenGroups
    eos_ids: tuple[int, ...]
    distance: NDArray[np.int32]
    """[num_states] fewest tokens to an accepting state, -1 where no tokens lead to one."""
    farthest: NDArray[np.int32]
    """[num_states] the greatest distance that one token leads to, -1 where no token is possible."""
    stored: "Stored | None"
    """All edges, unless they are too many to keep."""

    def edges(self, state: int) -> tuple[Ints, Ints]:
        """The groups that may come next, and where each leads."""
        if self.stored is not None:
            return self.stored.edges(state)
        blocks = list(self.groups.walk(self.dfa.table, np.array([state])))
        if not blocks:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        group, target = (np.concatenate([block[part] for block in blocks]) for part in (1, 2))
        live = self.distance[target] >= 0
        return group[live], target[live]

    def next(self, state: int, token: bytes) -> int:
        """Where a token leads; -1 where it may not come."""
        state = self.follow(state, token)
        return state if state >= 0 and self.distance[state] >= 0 else -1

    def follow(self, state: int, text: bytes) -> int:
        """Where bytes lead that need not be tokens; -1 where they may not come."""
        for byte in text:
            state = self.dfa.next(state, byte)
            if state < 0:
                break
        return state

    def mask(self, state: int, budget: int) -> NDArray[np.int32]:
        """[num_words] one bit per token: those after which the text can be completed in `budget` tokens.

        Those that end the answer are set where the state is accepting. Shared: not to be changed.
        """
        budget = min(budget, int(self.farthest[state]))
        return _masks.get((self._identity, state, budget), lambda: self._mask(state, budget))

    def first_token(self, state: int, budget: int) -> int:
        """The lowest id after which the text can be completed in `budget` tokens; -1 where there is none."""
        allowed = self._allowed(state, budget)[self.groups.of_token]
        place = int(np.argmax(allowed))
        return place if allowed[place] else -1

    def _mask(self, state: int, budget: int) -> NDArray[np.int32]:
        """One mask for all states that allow the same: in `[a-z]{1,1000}` there are sixteen different ones."""
        allowed, accepting = self._allowed(state, budget), bool(self.dfa.accepting[state])
        choice = np.packbits(allowed).tobytes()
        return _masks.get((self._identity, choice, accepting), lambda: self._packed(allowed, accepting))

    def _packed(self, allowed: NDArray[np.bool_], accepting: bool) -> NDArray[np.int32]:
        num_tokens = len(self.groups.of_token)
        bits = np.zeros((num_tokens + 31) // 32 * 32, np.bool_)
        np.take(allowed, self.groups.of_token, out=bits[:num_tokens], mode="clip")  # every group is in range
        if accepting:
            bits[list(self.eos_ids)] = True
        mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)
        mask.flags.writeable = False
        return mask

    def _allowed(self, state: int, budget: int) -> NDArray[np.bool_]:
        group, target = self.edges(state)
        allowed = np.zeros(self.groups.num_nodes, np.bool_)
        allowed[group[self.distance[target] <= budget]] = True
        return allowed

    @cached_property
    def _identity(self) -> object:
        """Names this automaton in the cache, without keeping it alive."""
        return object()


@dataclass(frozen=True, slots=True)
class Stored:
    """Edges by where they start."""

    start: NDArray[np.int32]
    """[num_states + 1]."""
    group: NDArray[np.int32]
    target: NDArray[np.int32]

    def edges(self, state: int) -> tuple[Ints, Ints]:
        part = slice(self.start[state], self.start[state + 1])
        return self.group[part], self.target[part]


def compile_finite(dfa: DFA, vocabulary: Vocabulary, effort: Effort) -> FiniteAutomaton:
    """Raises ConstraintError where the vocabulary cannot spell any text of the language."""
    if dfa.is_empty:
        raise ConstraintError("no text satisfies the constraint")
    effort.check_states(dfa.num_states)
    groups = TokenGroups.build(vocabulary.trie, dfa.byte_class, np.logical_or.reduce(dfa.table >= 0, axis=0))
    effort.spend(groups.num_nodes)
    origin, target, blocks = _follow(dfa, groups, effort)
    distance = _distances(dfa.accepting, origin, target, effort.spend)
    if distance[0] < 0:
        raise ConstraintError("the model's tokens cannot spell any text that satisfies the constraint")
    farthest = np.full(dfa.num_states, -1, np.int32)
    np.maximum.at(farthest, origin, distance[target])
    stored = None if blocks is None else _store(blocks, distance)
    return FiniteAutomaton(dfa, groups, vocabulary.eos_ids, distance, farthest, stored)


def _follow(dfa: DFA, groups: TokenGroups, effort: Effort) -> tuple[Ints, Ints, list[Edges] | None]:
    """Which states one token leads to which, by rising target; and all edges, if they are not too many."""
    num_states, num_edges, num_new = dfa.num_states, 0, 0
    blocks: list[Edges] | None = []
    pairs: list[NDArray[np.int64]] = []
    for origin, group, target in groups.walk(dfa.table, np.arange(num_states), effort.spend):
        pairs.append(np.unique(target.astype(np.int64) * num_states + origin))
        num_new += len(pairs[-1])
        num_edges += len(origin)
        if num_new > _COMPACT_EVERY:
            pairs, num_new = [np.unique(np.concatenate(pairs))], 0
            if len(pairs[0]) > _MAX_PAIRS:
                raise ConstraintTooComplex(
                    f"the constraint's automaton over tokens has more than {_MAX_PAIRS} transitions"
                )
        if blocks is not None:
            blocks.append((origin.astype(np.int32), group.astype(np.int32), target.astype(np.int32)))
            if num_edges > _MAX_STORED_EDGES:
                blocks = None
    keys = np.unique(np.concatenate(pairs)) if pairs else np.zeros(0, np.int64)
    return keys % num_states, keys // num_states, blocks


def _distances(
    accepting: NDArray[np.bool_], origin: Ints, target: Ints, spend: Callable[[int], None]
) -> NDArray[np.int32]:
    """Breadth-first search backwards from the accepting states. The pairs are sorted by target."""
    distance = np.full(len(accepting), -1, np.int32)
    distance[accepting] = 0
    start = np.searchsorted(target, np.arange(len(accepting) + 1)).tolist()
    frontier: list[int] = np.flatnonzero(accepting).tolist()
    level = 0
    while frontier:
        level += 1
        found: list[int] = []
        spend(len(frontier))
        for state in frontier:
            before = origin[start[state] : start[state + 1]]
            before = before[distance[before] < 0]
            distance[before] = level
            found += before.tolist()
        frontier = found
    return distance


def _store(blocks: list[Edges], distance: NDArray[np.int32]) -> Stored:
    """The edges that lead somewhere, sorted by where they start."""
    if not blocks:
        return Stored(np.zeros(len(distance) + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    origin, group, target = (np.concatenate([block[part] for block in blocks]) for part in range(3))
    live = np.flatnonzero(distance[target] >= 0)
    order = live[np.argsort(origin[live], kind="stable")]
    start = np.searchsorted(origin[order], np.arange(len(distance) + 1)).astype(np.int32)
    return Stored(start, group[order].astype(np.int32), target[order].astype(np.int32))
