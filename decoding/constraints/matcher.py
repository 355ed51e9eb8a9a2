"""What the engine asks of a constraint for one branch, and the matcher of context-free constraints.

A matcher follows one branch's tokens. Before each token it fills a row of the step's bitmask; after the choice it
decides what is appended: the chosen token, or, where that would leave too few tokens to complete the text, the
first token of a completion that does fit ("commit or close"). So the text is complete when the tokens run out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.grammar_masks import GrammarMasks
from cadenza.decoding.constraints.vocabulary import Vocabulary

Bitmask = NDArray[np.int32]
"""[num_words]: token t is allowed where bit t & 31 of word t >> 5 is set."""

_MAX_FORCED_BYTES = 512


class Matcher(Protocol):
    """`remaining` is always the number of tokens that may still be generated, the one in question included."""

    @property
    def is_complete(self) -> bool:
        """The text so far satisfies the constraint."""

    @property
    def is_ended(self) -> bool:
        """The text is complete, and nothing may follow."""

    @property
    def limited(self) -> bool:
        """The budget has taken a choice from the model."""

    def fill(self, row: Bitmask, remaining: int) -> None:
        """Write the tokens that may come next. EOS is allowed exactly where the text is complete."""

    def accept(self, token_id: int, remaining: int) -> int:
        """Go on by `token_id`, which `fill` allowed; or by another one, returned, if the budget asks for it."""

    def forced(self, remaining: int) -> list[int]:
        """Go on by the tokens to which there is no alternative, and return them."""

    def fork(self) -> "Matcher":
        """A matcher at the same place that goes on by itself, perhaps in another thread. Nothing is read again."""


@dataclass(slots=True)
class GrammarMatcher:
    """The masks say what may come next, our parser of the same grammar how soon the text can be complete."""

    parser: Parser
    vocabulary: Vocabulary
    spells_completions: bool
    """No completion needs more tokens than it has bytes."""
    masks: GrammarMasks
    encode: Callable[[bytes], list[int] | None]
    """The model's own tokenization of some text, None where it has none."""
    _completion: list[int] | None = None
    """Tokens that complete the text from here, where they have been looked for."""
    _has_ended: bool = False
    """By a token that ends an answer."""
    limited: bool = False

    @property
    def is_complete(self) -> bool:
        return self.parser.is_complete

    @property
    def is_ended(self) -> bool:
        return self._has_ended or self.parser.is_ended

    def fill(self, row: Bitmask, remaining: int) -> None:
        self.masks.fill(row, self.parser)
        # the parser decides when the text is complete; a model may have several tokens that end it
        words, ends = row.view(np.uint32), self.vocabulary.eos_ids
        for token_id in ends:
            bit = np.uint32(1 << (token_id & 31))
            word = words[token_id >> 5]
            words[token_id >> 5] = word | bit if self.parser.is_complete else word & ~bit

    def accept(self, token_id: int, remaining: int) -> int:
        if token_id in self.vocabulary.eos_ids:
            self._has_ended = True
            return token_id
        if self._try(token_id, remaining):
            return token_id
        self.limited = True
        completion = self._complete(remaining)
        if not completion:  # complete as it is, and what the model would add has no room for its own end
            self._has_ended = True
            return self.vocabulary.eos_ids[0]
        self._follow(completion[0])
        self.masks.advance(completion[0])
        return completion[0]

    def forced(self, remaining: int) -> list[int]:
        run = self.parser.forced(_MAX_FORCED_BYTES)
        appended: list[int] = []
        for token_id in self.vocabulary.forced_tokens(run, self.encode) if run else []:
            if len(appended) == remaining or not self._try(token_id, remaining - len(appended)):
                break
            appended.append(token_id)
        return appended

    def fork(self) -> "GrammarMatcher":
        return replace(self, parser=self.parser.fork(), masks=self.masks.fork())

    def _try(self, token_id: int, remaining: int) -> bool:
        """Go on by the token if the text can then still be completed; nothing changes otherwise."""
        held = self._completion
        self._follow(token_id)
        if self._fits(remaining - 1):
            self.masks.advance(token_id)
            return True
        self.parser.rollback(len(self.vocabulary.tokens[token_id]))
        self._completion = held
        return False

    def _follow(self, token_id: int) -> None:
        text = self.vocabulary.tokens[token_id]
        if not text or not self.parser.advance(text):
            raise MatcherError(f"token {token_id} ({text!r}) does not continue the text")
        held = self._completion
        self._completion = held[1:] if held and held[0] == token_id else None

    def _fits(self, budget: int) -> bool:
        """Whether the text can be completed in `budget` tokens. Fewer bytes than that are enough to know."""
        if self.spells_completions and self.parser.min_bytes() <= budget:
            return True
        completion = self._shortest()
        return completion is not None and len(completion) <= budget

    def _complete(self, budget: int) -> list[int]:
        completion = self._shortest()
        if completion is None or len(completion) > budget:
            raise MatcherError(f"no completion of {budget} tokens is known")
        return completion

    def _shortest(self) -> list[int] | None:
        """The completion that is held, or else is looked for now; None where no tokens spell one."""
        if self._completion is None:
            self._completion = self.vocabulary.segment(self.parser.completion())
        return self._completion
