"""The bytes of every token that a constraint may choose, and how bytes are cut into tokens.

Knows nothing of automata, grammars or models: a tokenizer is whatever can say the bytes of its ids.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Set
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.token_trie import TokenTrie


class TokenSource(Protocol):
    """What is asked of a tokenizer."""

    @property
    def special_ids(self) -> Set[int]: ...

    @property
    def added_ids(self) -> Set[int]:
        """Added to the trained vocabulary, special ones included."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class TextsInOrder(NamedTuple):
    token_ids: NDArray[np.int64]
    texts: list[bytes]
    shared: list[int]
    """How many bytes each text has in common with the one before it, from the start."""


class Vocabulary:
    """Immutable, picklable, safe to share between threads. Tables are made when first needed."""

    def __init__(self, tokens: Iterable[bytes], eos_ids: Iterable[int]) -> None:
        """tokens: the bytes of each id, b"" for ids that no constraint may choose as text.

        The ids that end an answer are never text; those beyond the tokens cannot be chosen, so they are left out.
        """
        listed = list(tokens)
        self.eos_ids = tuple(sorted(token_id for token_id in set(eos_ids) if 0 <= token_id < len(listed)))
        for token_id in self.eos_ids:
            listed[token_id] = b""
        self.tokens = tuple(listed)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: TokenSource, eos_ids: Iterable[int], vocab_size: int, *, with_added: bool = False
    ) -> "Vocabulary":
        """with_added: added tokens that are not special, such as `</think>` in some models, are text."""
        held_back = tokenizer.special_ids if with_added else tokenizer.special_ids | tokenizer.added_ids
        known = min(vocab_size, tokenizer.vocab_size)
        tokens = [
            b"" if token_id in held_back else tokenizer.token_bytes(token_id) for token_id in range(known)
        ]
        return cls(tokens + [b""] * (vocab_size - known), eos_ids)

    def __reduce__(self) -> "tuple[type[Vocabulary], tuple[tuple[bytes, ...], tuple[int, ...]]]":
        return type(self), (self.tokens, self.eos_ids)  # the tables are made again rather than sent

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def num_words(self) -> int:
        """Words of 32 bits in a mask."""
        return (self.size + 31) // 32

    @cached_property
    def fingerprint(self) -> str:
        lengths = ",".join(str(len(token)) for token in self.tokens)
        digest = hashlib.sha256(f"{self.eos_ids};{lengths};".encode())
        digest.update(b"".join(self.tokens))
        return digest.hexdigest()

    def prepare(self) -> None:
        """Make the tables now, rather than when the first constraint needs them."""
        _ = self.trie, self._lengths, self._sorted, self._longest

    @cached_property
    def in_order(self) -> "TextsInOrder":
        """Every token that is text, sorted by its bytes."""
        token_ids = sorted((i for i, token in enumerate(self.tokens) if token), key=self.tokens.__getitem__)
        texts = [self.tokens[token_id] for token_id in token_ids]
        shared = [0, *(_num_shared(*pair) for pair in pairwise(texts))]
        return TextsInOrder(np.array(token_ids, np.int64), texts, shared[: len(texts)])

    @cached_property
    def trie(self) -> TokenTrie:
        return TokenTrie.build(self.tokens)

    def spells(self, data: Iterable[int]) -> bool:
        """Whether each of the bytes is a token: then no text of them needs more tokens than it has bytes."""
        return all(bytes([byte]) in self._ids for byte in data)

    def segment(self, data: bytes) -> list[int] | None:
        """The fewest tokens that spell the bytes, the longest first among equals; None where there are none."""
        best: list[tuple[int, int] | None] = [None] * len(data) + [
            (0, 0)
        ]  # tokens to the end, length of the next
        for start in range(len(data) - 1, -1, -1):
            lengths = self._lengths.get(data[start : start + 2])
            if lengths is None:
                lengths = self._lengths.get(data[start : start + 1], ())
            for length in lengths:
                rest = best[start + length] if start + length <= len(data) else None
                if rest is None or data[start : start + length] not in self._ids:
                    continue
                held = best[start]
                if held is None or rest[0] + 1 < held[0]:
                    best[start] = rest[0] + 1, length
        if best[0] is None:
            return None
        tokens, place = [], 0
        while place < len(data):
            step = best[place]
            assert step is not None
            tokens.append(self._ids[data[place : place + step[1]]])
            place += step[1]
        return tokens

    def forced_tokens(
        self,
        run: bytes,
        encode: Callable[[bytes], list[int] | None],
        may_follow: Callable[[bytes], bool] | None = None,
    ) -> list[int]:
        """Tokens for the beginning of a text that must come next.

        As the model itself would write it (`encode`), less the tokens at the end that could turn out otherwise,
        because some token begins inside the run and goes on beyond it. This is what guidance calls token healing.
        may_follow: whether bytes can come after the run; without it, anything can.
        """
        ids = encode(run)
        if ids is None or b"".join(self._bytes_of(token_id) for token_id in ids) != run:
            ids = self.segment(run) or []
        starts = range(max(0, len(run) - self._longest), len(run))
        safe = next((start for start in starts if self._extends(run[start:], b"", may_follow)), len(run))
        kept, end = [], 0
        for token_id in ids:
            end += len(self.tokens[token_id])
            if end > safe:
                break
            kept.append(token_id)
        return kept

    def _bytes_of(self, token_id: int) -> bytes:
        return self.tokens[token_id] if 0 <= token_id < self.size else b""

    def _extends(self, piece: bytes, rest: bytes, may_follow: Callable[[bytes], bool] | None) -> bool:
        """Whether a token begins with piece + rest and goes on as it may."""
        tokens, prefix = self._sorted, piece + rest
        place = bisect_right(tokens, prefix)
        while place < len(tokens) and tokens[place].startswith(prefix):
            longer = tokens[place][: len(prefix) + 1]
            following = longer[len(piece) :]
            if may_follow is None:
                return True
            if may_follow(following) and (
                tokens[place] == longer or self._extends(piece, following, may_follow)
            ):
                return True
            place = bisect_left(tokens, _after(longer)) if _after(longer) else len(tokens)
        return False

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """The lowest id of each spelling."""
        ids = {token: token_id for token_id, token in reversed(list(enumerate(self.tokens)))}
        ids.pop(b"", None)
        return ids

    @cached_property
    def _sorted(self) -> list[bytes]:
        return sorted(self._ids)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens), default=0)

    @cached_property
    def _lengths(self) -> dict[bytes, tuple[int, ...]]:
        """The lengths, longest first, of the tokens that may begin with two bytes, or stand for one alone."""
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        for start, known in lengths.items():
            if start[:1] in self._ids:
                known.add(1)
        return {start: tuple(sorted(known, reverse=True)) for start, known in lengths.items()}


def _num_shared(first: bytes, second: bytes) -> int:
    """The length of the longest beginning of both."""
    length = min(len(first), len(second))
    while first[:length] != second[:length]:
        length -= 1
    return length


def _after(prefix: bytes) -> bytes:
    """The first bytes in order that do not begin with the prefix; none where there are none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b""
