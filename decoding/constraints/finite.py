"""Finite constraints, a regular expression or a choice: the matcher that follows one branch's tokens.

Masks and distances are exact, so the matcher never has to take back a token: what `fill` allows can always be
completed within the budget. Knows nothing of how constraints are written.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.token_automaton import FiniteAutomaton, compile_finite
from cadenza.decoding.constraints.vocabulary import Vocabulary

__all__ = ["FiniteAutomaton", "FiniteMatcher", "compile_finite"]

_MAX_FORCED_BYTES = 512
_ENDED = -1
"""The state after a token that ends the answer."""


class FiniteMatcher:
    """`remaining` is always the number of tokens that may still be generated, the one in question included."""

    def __init__(
        self,
        automaton: FiniteAutomaton,
        vocabulary: Vocabulary,
        encode: Callable[[bytes], list[int] | None] | None = None,
    ) -> None:
        """encode: the model's own tokenization of some text, None where it has none."""
        self._automaton = automaton
        self._vocabulary = vocabulary
        self._encode = encode or vocabulary.segment
        self._state = 0
        self.limited = False
        """The budget has taken a choice from the model."""

    @property
    def is_complete(self) -> bool:
        """The text so far satisfies the constraint."""
        return self._state == _ENDED or bool(self._automaton.dfa.accepting[self._state])

    @property
    def is_ended(self) -> bool:
        """The text is complete, and nothing may follow."""
        return self._state == _ENDED or (self.is_complete and self._automaton.farthest[self._state] < 0)

    @property
    def min_tokens(self) -> int:
        """Fewest tokens that complete the text from here."""
        return 0 if self._state == _ENDED else int(self._automaton.distance[self._state])

    def fill(self, row: NDArray[np.int32], remaining: int) -> None:
        """Write the tokens that may come next: exactly those after which the text can be completed in time.

        Those that end the answer are allowed exactly where the text is complete.
        """
        if self._state == _ENDED:
            raise MatcherError("the answer has ended; no token may follow")
        if remaining < max(1, self.min_tokens):
            raise MatcherError(
                f"{self.min_tokens} tokens are needed to complete the text, {remaining} remain"
            )
        mask = self._automaton.mask(self._state, remaining - 1)
        row[: len(mask)] = mask
        row[len(mask) :] = 0

    def accept(self, token_id: int, remaining: int) -> int:
        """Go on by a token that `fill` allowed; if the budget forbids it, by another one, which is returned."""
        if self._state != _ENDED and self._automaton.farthest[self._state] > remaining - 1:
            # the mask had less than it could have had: an end that was chosen from it may be the budget's, too
            self.limited = True
        if token_id not in self._vocabulary.eos_ids:
            following = self._next(token_id)
            if self._automaton.distance[following] > remaining - 1:
                token_id = self._closing_token(self._state)
        self.advance(token_id)
        return token_id

    def advance(self, token_id: int) -> None:
        """Go on by a token, whatever the budget. Raises MatcherError if the constraint does not allow it."""
        if token_id in self._vocabulary.eos_ids:
            if self._state == _ENDED or not self.is_complete:
                raise MatcherError(f"token {token_id} would end the answer, which is not complete")
            self._state = _ENDED
        else:
            self._state = self._next(token_id)

    def forced(self, remaining: int) -> list[int]:
        """Go on by the tokens to which there is no alternative, and return them."""
        if self._state == _ENDED:
            return []
        automaton = self._automaton
        run, end = self._forced_run()
        appended: list[int] = []
        if not run:
            return appended
        for token_id in self._vocabulary.forced_tokens(
            run, self._encode, lambda rest: automaton.follow(end, rest) >= 0
        ):
            remaining -= 1
            following = automaton.next(self._state, self._vocabulary.tokens[token_id])
            if following < 0 or automaton.distance[following] > remaining:
                break
            self._state = following
            appended.append(token_id)
        return appended

    def completion(self) -> list[int]:
        """Fewest tokens that complete the text, the lowest ids among equals."""
        tokens: list[int] = []
        state = self._state
        while state != _ENDED and not self._automaton.dfa.accepting[state]:
            tokens.append(self._closing_token(state))
            state = self._automaton.next(state, self._vocabulary.tokens[tokens[-1]])
        return tokens

    def fork(self) -> "FiniteMatcher":
        other = FiniteMatcher(self._automaton, self._vocabulary, self._encode)
        other._state, other.limited = self._state, self.limited
        return other

    def _next(self, token_id: int) -> int:
        text = self._vocabulary.tokens[token_id] if 0 <= token_id < self._vocabulary.size else b""
        following = self._automaton.next(self._state, text) if text and self._state != _ENDED else -1
        if following < 0:
            raise MatcherError(f"token {token_id} ({text!r}) does not continue the text")
        return following

    def _closing_token(self, state: int) -> int:
        return self._automaton.first_token(state, int(self._automaton.distance[state]) - 1)

    def _forced_run(self) -> tuple[bytes, int]:
        """The bytes to which there is no alternative, and the state after them."""
        dfa, state, run = self._automaton.dfa, self._state, bytearray()
        while len(run) < _MAX_FORCED_BYTES and not dfa.accepting[state]:
            classes = np.flatnonzero(dfa.table[state] >= 0)
            if len(classes) != 1:
                break
            candidates = np.flatnonzero(dfa.byte_class == classes[0])
            if len(candidates) != 1:
                break
            run.append(int(candidates[0]))
            state = dfa.next(state, run[-1])
        return bytes(run), state
