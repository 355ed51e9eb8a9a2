"""The token masks of a context-free constraint: llguidance's, and our own parser's where those would take too long.

llguidance's work on a mask grows with the ambiguity of a grammar. It is bounded: beyond the bound, when masks are slow
or forks are, or after any other error of its matcher, the branch's masks are read off our own parser. Slower at a new
place in the text, a look-up at one that it has seen; exact like the other, so that it does not matter when the change
comes.
"""

import logging
import time
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
"""Masks that are kept, for a branch and its forks together."""
_SLOW_SECONDS, _MAX_SLOW = 0.02, 3
"""Of processor time for one mask, and how many such masks are put up with."""
_SLOW_FORK_SECONDS = 0.001
"""As bad as a slow mask: some ten megabytes of llguidance's chart have been copied."""
_REFUEL_EVERY = 16
"""Tokens that llguidance may follow before it computes a mask, which is when its lexer gets new fuel."""


@dataclass(slots=True)
class GrammarMasks:
    """llguidance is asked in `fill` only, which is off the engine's thread: to make a matcher of a large grammar takes
    a tenth of a second.

    Forks share llguidance's lexer. What one of them asks too much of it ends it for all; the others then make
    themselves a matcher of their own, once in a line of forks, so that none fails of what it would not have done alone.
    """

    vocabulary: Vocabulary
    build: Callable[[], MaskMatcher]
    _matcher: MaskMatcher | None = None
    _tokens: list[int] = field(default_factory=list)
    """Of the text so far."""
    _num_followed: int = 0
    """How many of them the matcher is past."""
    _num_slow: int = 0
    _is_shared: bool = False
    """The lexer has been used by forks."""
    _may_rebuild: bool = True
    _has_failed: bool = False
    _known: dict[object, NDArray[np.int32]] = field(default_factory=dict)
    """Masks of the parser's, by its place. Shared with forks, whose parsers share their places."""

    def fill(self, row: NDArray[np.int32], parser: Parser) -> None:
        """row: [num_words]. Sets the bits of the tokens that may come next, and clears the others; the bits of
        tokens that end the answer may be either."""
        while not self._has_failed:
            try:
                return self._ask(row)
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
        self._tokens.append(token_id)

    def fork(self) -> "GrammarMasks":
        matcher = None
        if self._matcher is not None:
            started = time.thread_time()
            matcher = self._matcher.fork()
            self._num_slow += time.thread_time() - started > _SLOW_FORK_SECONDS
            self._is_shared = True
        return replace(self, _matcher=matcher, _tokens=self._tokens.copy())

    def _ask(self, row: NDArray[np.int32]) -> None:
        """llguidance's mask. Raises MatcherError, too, where that costs too much."""
        if self._num_slow > _MAX_SLOW:
            raise _Slow("llguidance's masks are slow")
        matcher = self._caught_up(row)
        started = time.thread_time()
        matcher.fill(row)
        self._num_slow += time.thread_time() - started > _SLOW_SECONDS

    def _caught_up(self, scratch: NDArray[np.int32]) -> MaskMatcher:
        """The matcher, past all tokens of the text."""
        matcher = self._matcher = self._matcher or self.build()
        while self._num_followed < len(self._tokens):
            if self._num_followed % _REFUEL_EVERY == _REFUEL_EVERY - 1:
                matcher.fill(scratch)
            matcher.advance(self._tokens[self._num_followed])
            self._num_followed += 1
        return matcher

    def _fail(self, error: MatcherError) -> None:
        self._matcher, self._num_followed = None, 0
        if self._is_shared and self._may_rebuild and not isinstance(error, _Slow):
            self._is_shared = self._may_rebuild = False
            log.info("a lexer of its own for one branch: %s", error)
            return
        log.info("our own parser's masks from here on: %s", error)
        self._has_failed = True

    def _read_off(self, parser: Parser) -> NDArray[np.int32]:
        is_allowed = np.zeros(self.vocabulary.num_words * 32, np.bool_)
        texts = self.vocabulary.in_order
        is_allowed[texts.token_ids[parser.spelled(texts.texts, texts.shared)]] = True
        return np.packbits(is_allowed, bitorder="little").view(np.int32)


class _Slow(MatcherError):
    """llguidance would have given the mask."""
