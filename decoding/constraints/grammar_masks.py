"""The token masks of a context-free constraint: llguidance's, and our own parser's where those would take too long.

llguidance's work on a mask grows with the ambiguity of a grammar. It is bounded: beyond the bound, or after any other
error of its matcher, the branch's masks are read off our own parser. Slower at a new place in the text, a look-up at
one that it has seen; exact like the other.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher
from cadenza.decoding.constraints.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_MAX_PLACES = 64
"""Masks that are kept, per branch."""


@dataclass(slots=True)
class GrammarMasks:
    vocabulary: Vocabulary
    build: Callable[[], MaskMatcher]
    _matcher: MaskMatcher | None = None
    """Made when the first mask is asked for, which is off the engine's thread."""
    _has_failed: bool = False
    _known: dict[object, NDArray[np.int32]] = field(default_factory=dict)
    """Masks of the parser's, by its place."""

    def fill(self, row: NDArray[np.int32], parser: Parser) -> None:
        """row: [num_words]. Sets the bits of the tokens that may come next, and clears the others; the bits of
        tokens that end the answer may be either."""
        if not self._has_failed:
            try:
                self._matcher = self._matcher or self.build()
                self._matcher.fill(row)
                return
            except MatcherError as error:
                self._fail(error)
        mask = self._known.get(parser.place)
        if mask is None:
            if len(self._known) >= _MAX_PLACES:
                self._known.clear()
            mask = self._known[parser.place] = self._read_off(parser)
        row[:] = mask

    def advance(self, token_id: int) -> None:
        """Go on by a token that may come next."""
        if not self._has_failed:
            try:
                self._matcher = self._matcher or self.build()
                self._matcher.advance(token_id)
            except MatcherError as error:
                self._fail(error)

    def fork(self) -> "GrammarMasks":
        matcher = None if self._matcher is None or self._has_failed else self._matcher.fork()
        return replace(self, _matcher=matcher, _known=dict(self._known))

    def _fail(self, error: MatcherError) -> None:
        log.info("our own parser's masks from here on: %s", error)
        self._matcher, self._has_failed = None, True

    def _read_off(self, parser: Parser) -> NDArray[np.int32]:
        is_allowed = np.zeros(self.vocabulary.num_words * 32, np.bool_)
        texts = self.vocabulary.in_order
        is_allowed[texts.token_ids[parser.spelled(texts.texts, texts.shared)]] = True
        return np.packbits(is_allowed, bitorder="little").view(np.int32)
