"""A terminal as the parser runs it: the automaton in flat arrays, with the price of finishing it from each state.

Prices count bytes, and below that control characters, so that among completions of equal length one that people
can read is the cheapest. Knows nothing of rules.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.limits import Effort

BYTE = 1 << 32
"""The price of one byte. A control character costs one more."""


@dataclass(frozen=True, slots=True)
class Terminal:
    """State 0 is the start. Every state can still reach an accepting one. Picklable, never changed."""

    byte_class: bytes
    num_classes: int
    table: "array[int]"
    """[num_states * num_classes] the next state, -1 where there is none."""
    accepting: bytes
    """[num_states] 1 or 0."""
    sole_byte: "array[int]"
    """[num_states] the only byte that may follow, -1 where there are several, -2 where there is none."""
    cost: "array[int]"
    """[num_states] the price of the cheapest text to an accepting state."""
    best_byte: bytes
    """[num_states] the first byte of that text; meaningless in accepting states."""

    @property
    def is_nullable(self) -> bool:
        return bool(self.accepting[0])

    @property
    def only_empty(self) -> bool:
        return len(self.accepting) == 1 and self.sole_byte[0] == -2

    def next_bytes(self, state: int) -> list[int]:
        row = self.table[state * self.num_classes : (state + 1) * self.num_classes]
        return [byte for byte, kind in enumerate(self.byte_class) if row[kind] >= 0]

    def cheapest(self, state: int) -> bytes:
        """The text of `cost[state]`. May begin inside a character."""
        text = bytearray()
        while not self.accepting[state]:
            byte = self.best_byte[state]
            text.append(byte)
            state = self.table[state * self.num_classes + self.byte_class[byte]]
        return bytes(text)


def terminal_of(dfa: DFA, effort: Effort) -> Terminal:
    """The language of `dfa` is not empty."""
    kinds = np.asarray(dfa.byte_class, np.int64)
    num_classes = dfa.table.shape[1]
    preferred = _preferred_bytes(kinds, num_classes)
    cost, best_byte = _prices(dfa, preferred, effort)
    return Terminal(
        byte_class=kinds.astype(np.uint8).tobytes(),
        num_classes=num_classes,
        table=array("i", dfa.table.astype(np.int32).tobytes()),
        accepting=dfa.accepting.astype(np.uint8).tobytes(),
        sole_byte=array("i", _sole_bytes(dfa, kinds, preferred).tobytes()),
        cost=cost,
        best_byte=best_byte,
    )


def literal_terminal(text: bytes) -> Terminal:
    """What `terminal_of` makes of one string, without the detour: grammars are full of these."""
    distinct = sorted(set(text))
    kind_of = {byte: kind for kind, byte in enumerate(distinct)}
    num_classes = len(distinct) + 1  # the last one is of all other bytes
    table = array("i", [-1]) * ((len(text) + 1) * num_classes)
    cost = [0]
    for state, byte in enumerate(text):
        table[state * num_classes + kind_of[byte]] = state + 1
    for byte in reversed(text):
        cost.append(cost[-1] + BYTE + bool(_IS_CONTROL[byte]))
    return Terminal(
        byte_class=bytes(kind_of.get(byte, len(distinct)) for byte in range(256)),
        num_classes=num_classes,
        table=table,
        accepting=bytes(len(text)) + b"\x01",
        sole_byte=array("i", [*text, -2]),
        cost=array("q", reversed(cost)),
        best_byte=text + b"\x00",
    )


def _preference() -> list[int]:
    """All bytes, the ones that read best first: letters, digits, other visible ones, UTF-8's, controls."""

    def rank(byte: int) -> int:
        if byte < 0x20 or byte == 0x7F:
            return 4 if byte in b"\t\n\r" else 5
        if byte >= 0x80:
            return 3
        character = chr(byte)
        return 0 if character.islower() else 1 if character.isalnum() else 2

    return sorted(range(256), key=lambda byte: (rank(byte), byte))


_PREFERENCE = np.array(_preference())
_RANK = np.argsort(_PREFERENCE)
_IS_CONTROL = np.array([byte < 0x20 or byte == 0x7F for byte in range(256)])


def _preferred_bytes(kinds: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """[num_classes] the byte of each class that reads best, -1 for a class without bytes."""
    preferred = np.full(num_classes, -1, np.int64)
    backwards = _PREFERENCE[::-1]
    preferred[kinds[backwards]] = backwards  # of equal indices the last one stays
    return preferred


def _sole_bytes(dfa: DFA, kinds: NDArray[np.int64], preferred: NDArray[np.int64]) -> NDArray[np.int32]:
    live = dfa.table >= 0
    counts = live.astype(np.int64) @ np.bincount(kinds, minlength=len(preferred))
    bytes_of_one = np.where(live, preferred, -1).max(axis=1, initial=-1)
    return np.where(counts == 1, bytes_of_one, np.where(counts == 0, -2, -1)).astype(np.int32)


def _prices(dfa: DFA, preferred: NDArray[np.int64], effort: Effort) -> "tuple[array[int], bytes]":
    """Breadth first from the accepting states; within a level the fewest control characters decide."""
    sources, byte, targets = _edges(dfa, preferred)
    level = _levels(dfa, sources, targets, effort)
    tight = np.flatnonzero(level[targets] + 1 == level[sources])
    tight = tight[np.argsort(level[sources[tight]], kind="stable")]
    cost, best = [0] * dfa.num_states, [0] * dfa.num_states
    for source, first, target in zip(
        sources[tight].tolist(), byte[tight].tolist(), targets[tight].tolist(), strict=True
    ):
        price = cost[target] + BYTE + bool(_IS_CONTROL[first])
        if not cost[source] or price < cost[source]:
            cost[source], best[source] = price, first
        effort.spend()
    return array("q", cost), bytes(best)


def _edges(
    dfa: DFA, preferred: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Between two states one edge, by the byte that reads best; the edges of a state in order of preference."""
    columns = np.flatnonzero(preferred >= 0)
    columns = columns[np.argsort(_RANK[preferred[columns]])]
    table = dfa.table[:, columns].astype(np.int64)
    sources, column = np.nonzero(table >= 0)
    targets = table[sources, column]
    _, first = np.unique(sources * dfa.num_states + targets, return_index=True)
    first.sort()
    return sources[first], preferred[columns[column[first]]], targets[first]


def _levels(
    dfa: DFA, sources: NDArray[np.int64], targets: NDArray[np.int64], effort: Effort
) -> NDArray[np.int64]:
    """[num_states] fewest bytes to an accepting state."""
    order = np.argsort(targets, kind="stable")
    predecessors = sources[order].tolist()
    bounds = np.searchsorted(targets[order], np.arange(dfa.num_states + 1)).tolist()
    queue = np.flatnonzero(dfa.accepting).tolist()
    level = [-1] * dfa.num_states
    for state in queue:
        level[state] = 0
    for state in queue:  # grows while it is walked
        effort.spend()
        for source in predecessors[bounds[state] : bounds[state + 1]]:
            if level[source] < 0:
                level[source] = level[state] + 1
                queue.append(source)
    return np.array(level, np.int64)
