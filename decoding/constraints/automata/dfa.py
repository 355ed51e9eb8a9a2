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
    def is_empty(self) -> bool:
        return self.num_states == 0

    def next(self, state: int, byte: int) -> int:
        return int(self.table[state, self.byte_class[byte]])

    @cached_property
    def distance(self) -> NDArray[np.int32]:
        """[num_states] fewest bytes to an accepting state."""
        distance = np.full(self.num_states, -1, np.int32)
        distance[self.accepting] = 0
        level = 0
        while (distance < 0).any():
            reaches = (self.table >= 0) & (distance[self.table] == level)
            distance[(distance < 0) & reaches.any(axis=1)] = level + 1
            level += 1
        return distance

    def shortest(self, state: int) -> bytes:
        """A shortest text from `state` to acceptance, the lowest bytes among equals. May begin inside a character."""
        text = bytearray()
        while not self.accepting[state]:
            rest = self.distance[state] - 1
            byte = next(b for b in range(256) if (n := self.next(state, b)) >= 0 and self.distance[n] == rest)
            text.append(byte)
            state = self.next(state, byte)
        return bytes(text)

    def accepts(self, text: bytes) -> bool:
        state = -1 if self.is_empty else 0
        for byte in text:
            if state < 0:
                return False
            state = self.next(state, byte)
        return state >= 0 and bool(self.accepting[state])
