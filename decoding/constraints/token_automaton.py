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
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.token_cache import MaskCache
from cadenza.decoding.constraints.token_groups import Ints, TokenGroups
from cadenza.decoding.constraints.vocabulary import Vocabulary

_masks = MaskCache()
"""Shared by all automata of the process, so that their number does not matter."""


@dataclass(frozen=True)
class FiniteAutomaton:
    """Picklable; shared between threads. No edge leads to a state from which no tokens complete the text."""

    dfa: DFA
    eos_ids: tuple[int, ...]
    distance: Ints
    """[num_states] fewest tokens to an accepting state, -1 where no tokens lead to one."""
    farthest: Ints
    """[num_states] the greatest distance that one token leads to, -1 where no token is possible."""
    group_of_token: Ints
    """[num_tokens] tokens of one group lead to the same states everywhere; 0 for those that are never possible."""
    num_groups: int
    start: Ints
    """[num_states + 1] the edges of state s are start[s] .. start[s + 1]."""
    group: Ints
    """[num_edges] the tokens of an edge, rising within a state."""
    target: Ints
    """[num_edges] where it leads."""

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

    def mask(self, state: int, budget: int) -> Ints:
        """[num_words] one bit per token: those after which the text can be completed in `budget` tokens.

        Those that end the answer are set where the state is accepting. Shared: not to be changed.
        """
        budget = min(budget, int(self.farthest[state]))
        return _masks.get((self._identity, state, budget), lambda: self._mask(state, budget))

    def first_token(self, state: int, budget: int) -> int:
        """The lowest id after which the text can be completed in `budget` tokens; -1 where there is none."""
        allowed = self._allowed(state, budget)[self.group_of_token]
        place = int(np.argmax(allowed))
        return place if allowed[place] else -1

    def _mask(self, state: int, budget: int) -> Ints:
        """One mask for all states that allow the same: in `[a-z]{1,1000}` there are sixteen different ones."""
        allowed, accepting = self._allowed(state, budget), bool(self.dfa.accepting[state])
        choice = np.packbits(allowed).tobytes()
        return _masks.get((self._identity, choice, accepting), lambda: self._packed(allowed, accepting))

    def _packed(self, allowed: NDArray[np.bool_], accepting: bool) -> Ints:
        num_tokens = len(self.group_of_token)
        bits = np.zeros((num_tokens + 31) // 32 * 32, np.bool_)
        np.take(allowed, self.group_of_token, out=bits[:num_tokens], mode="clip")  # every group is in range
        if accepting:
            bits[list(self.eos_ids)] = True
        mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)
        mask.flags.writeable = False
        return mask

    def _allowed(self, state: int, budget: int) -> NDArray[np.bool_]:
        edges = slice(self.start[state], self.start[state + 1])
        allowed = np.zeros(self.num_groups, np.bool_)
        allowed[self.group[edges][self.distance[self.target[edges]] <= budget]] = True
        return allowed

    @cached_property
    def _identity(self) -> object:
        """Names this automaton in the cache, without keeping it alive."""
        return object()


def compile_finite(dfa: DFA, vocabulary: Vocabulary, effort: Effort) -> FiniteAutomaton:
    """Raises ConstraintError where the vocabulary cannot spell any text of the language."""
    if dfa.is_empty:
        raise ConstraintError("no text satisfies the constraint")
    effort.check_states(dfa.num_states)
    groups = TokenGroups.build(vocabulary.trie, dfa, effort)
    distance = _distances(dfa.accepting, groups, effort.spend)
    if distance[0] < 0:
        raise ConstraintError("the model's tokens cannot spell any text that satisfies the constraint")
    live = np.flatnonzero(distance[groups.target] >= 0)
    origin = groups.origin[live].astype(np.min_scalar_type(dfa.num_states))  # small integers sort faster
    live = live[np.argsort(origin, kind="stable")]
    farthest = np.full(dfa.num_states, -1, np.int32)
    np.maximum.at(farthest, groups.origin[live], distance[groups.target[live]])
    return FiniteAutomaton(
        dfa=dfa,
        eos_ids=vocabulary.eos_ids,
        distance=distance,
        farthest=farthest,
        group_of_token=groups.of_token,
        num_groups=groups.num_groups,
        start=np.searchsorted(groups.origin[live], np.arange(dfa.num_states + 1)).astype(np.int32),
        group=groups.group[live],
        target=groups.target[live],
    )


def _distances(accepting: NDArray[np.bool_], groups: TokenGroups, spend: Callable[[int], None]) -> Ints:
    """Breadth-first search backwards from the accepting states."""
    num_states = len(accepting)
    pairs = np.sort(groups.target.astype(np.int64) * num_states + groups.origin)
    target, origin = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], num_states)
    start = np.searchsorted(target, np.arange(num_states + 1)).tolist()
    distance = np.full(num_states, -1, np.int32)
    distance[accepting] = 0
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
