"""Deterministic automata over bytes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DFA:
    """A minimal automaton over the UTF-8 bytes of texts. Every state can still reach an accepting one.

    State 0 is the start. The empty language has no states. Picklable; shared between threads, never changed.
    """

    byte_class: NDArray[np.uint8]
    """[256] the class of each byte; bytes of one class lead to the same states everywhere."""
    table: NDArray[np.int32]
    """[num_states, num_classes] the next state, -1 where there is none."""
    accepting: NDArray[np.bool_]
    """[num_states]."""

    @property
    def num_states(self) -> int:
        return len(self.accepting)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return 1024 + int(self.table.nbytes)

    @property
    def is_empty(self) -> bool:
        return self.num_states == 0

    def next(self, state: int, byte: int) -> int:
        return int(self.table[state, self.byte_class[byte]])

    @cached_property
    def distance(self) -> NDArray[np.int32]:
        """[num_states] fewest bytes to an accepting state."""
        sources, columns = np.nonzero(self.table >= 0)
        pairs = np.unique(self.table[sources, columns].astype(np.int64) * self.num_states + sources)
        targets, befores = np.divmod(pairs, max(self.num_states, 1))
        start_of = np.searchsorted(targets, np.arange(self.num_states + 1)).tolist()
        before = befores.tolist()
        distance = [0 if accepts else -1 for accepts in self.accepting.tolist()]
        reached = [state for state, steps in enumerate(distance) if steps == 0]
        for state in reached:  # breadth first: grows while it is walked
            for source in before[start_of[state] : start_of[state + 1]]:
                if distance[source] < 0:
                    distance[source] = distance[state] + 1
                    reached.append(source)
        return np.array(distance, np.int32)

    def shortest(self, state: int) -> bytes:
        """A shortest text from `state` to acceptance, the lowest bytes among equals. May begin inside a character."""
        text = bytearray()
        while not self.accepting[state]:
            targets = self.table[state, self.byte_class]
            closer = (targets >= 0) & (self.distance[targets] == self.distance[state] - 1)
            byte = int(closer.argmax())
            text.append(byte)
            state = int(targets[byte])
        return bytes(text)

    def accepts(self, text: bytes) -> bool:
        state = -1 if self.is_empty else 0
        for byte in text:
            if state < 0:
                return False
            state = self.next(state, byte)
        return state >= 0 and bool(self.accepting[state])
