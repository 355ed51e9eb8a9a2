"""Token masks of a grammar, filled by llguidance's matcher.

Knows neither budgets nor completions. A matcher and its forks share llguidance's lexer: an automaton that grows with
what any of them reads, with one tank of fuel, filled up before each mask, and one error that ends them all.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import ConstraintTooComplex, MatcherError
from cadenza.decoding.constraints.vocabulary import Vocabulary

_NO_TEXT = 0xFF
"""A byte that no text holds; to llguidance, the first one of a special token's name."""
_MAX_ORDINARY_LINES = 200
"""Of a grammar that is read on the caller's stack; a level takes three kilobytes, a line is a level at most."""
_STACK_BASE, _STACK_PER_LINE, _MAX_STACK = 1 << 20, 8 << 10, 1 << 30
_BUILDING = threading.Lock()
_MAX_ITEMS = 200_000
"""Of a mask. Grammars that are not ambiguous take some hundreds, objects of hundreds of optional keys tens of
thousands."""


def _limits() -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=20_000,
        initial_lexer_fuel=10_000_000,
        step_lexer_fuel=2_000_000,
        step_max_items=_MAX_ITEMS,
        max_grammar_size=2_000_000,
        verbose_errors=False,
    )


class _Tokens:
    """A vocabulary in the way in which llguidance asks for one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [
            token_id for token_id, token in enumerate(vocabulary.tokens) if not token or token[0] == _NO_TEXT
        ]
        self.tokens = list(vocabulary.tokens)
        for token_id in self.special_token_ids:
            self.tokens[token_id] = f"<|{token_id}|>".encode()

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("masks are computed without tokenizing text")


class MaskTables:
    """What the matchers of one vocabulary share. Safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.eos_ids:
            raise ValueError("masks need a token that ends the text")
        self.vocabulary = vocabulary
        self.tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(vocabulary)), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_ids)
        )


def check_llguidance(text: str) -> None:
    """Raises ConstraintTooComplex if llguidance does not take the grammar, or cannot begin a text of it.

    What `to_llguidance` prints is well-formed, so what it meets are its own limits.
    """
    matcher = _built(text, _byte_tokenizer())
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ConstraintTooComplex(
            f"llguidance cannot run the constraint: {_first_line(matcher.get_error())}"
        )


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def _built(text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """llguidance reads rules within rules recursively and would overrun an ordinary stack, which ends the process."""
    num_lines = text.count("\n")
    if num_lines <= _MAX_ORDINARY_LINES:
        return LLMatcher(tokenizer, text, log_level=0, limits=_limits())
    with _BUILDING:
        usual = threading.stack_size(min(_STACK_BASE + num_lines * _STACK_PER_LINE, _MAX_STACK))
        try:
            pool = ThreadPoolExecutor(1, "cadenza-llguidance")
            future = pool.submit(LLMatcher, tokenizer, text, log_level=0, limits=_limits())
        finally:
            threading.stack_size(usual)
    try:
        return future.result()
    finally:
        pool.shutdown()


@dataclass(slots=True)
class MaskMatcher:
    """Follows one text. Not safe to use from two threads at once; different matchers are, forks included."""

    tables: MaskTables
    _matcher: LLMatcher
    _reading: threading.Lock
    """Held while the shared lexer works: llguidance's own lock keeps the interpreter's while it is waited for."""

    @classmethod
    def build(cls, text: str, tables: MaskTables) -> "MaskMatcher":
        """text: a grammar that `check_llguidance` takes."""
        matcher = cls(tables, _built(text, tables.tokenizer), threading.Lock())
        matcher._check()
        return matcher

    def fill(self, row: NDArray[np.int32]) -> None:
        """row: [num_words], contiguous. Sets the bits of the tokens that may come next, and clears the others.

        The tokens that end the text may come where it is in the language. Releases the interpreter's lock.
        """
        assert row.shape == (self.tables.vocabulary.num_words,)
        assert row.flags.c_contiguous
        assert row.dtype == np.int32
        with self._reading:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def advance(self, token_id: int) -> None:
        """Go on by a token that the mask allowed."""
        with self._reading:
            is_taken = self._matcher.consume_token(token_id)
        if not is_taken:
            self._check()
            raise MatcherError(f"llguidance does not take token {token_id} here")
        self._check()

    def fork(self) -> "MaskMatcher":
        """A matcher of the same text that goes on by itself. Copies llguidance's chart of the text, a few bytes for
        each of the text's, many where the grammar is ambiguous; nothing is read again."""
        return MaskMatcher(self.tables, self._matcher.deep_copy(), self._reading)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MatcherError(f"llguidance: {_first_line(self._matcher.get_error())}")


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "it failed")
