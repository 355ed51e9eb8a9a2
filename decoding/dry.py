"""DRY ("don't repeat yourself", p-e-w 2024), as llama.cpp has it: a token that would go on repeating what stands
further up is made the less likely the longer the repetition already is.

    penalty = multiplier * base ** (length - allowed_length)    where length >= allowed_length

length: how many tokens before the new one are the same as those before an earlier occurrence of it. Matches do not
reach across sequence breakers: strings that are looked for in the texts of tokens when a request is admitted. Knows
token ids and, for the breakers, a tokenizer; no logits, no requests.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

_LARGEST_PENALTY = (
    1e30  # leaves nothing of a probability, but a number of the logit, so that masks stay the lowest
)
_AFTER_BYTES = "\u0100"
_WORK_PER_TOKEN = 4


class ByteTokenizer(Protocol):
    def __hash__(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Breakers:
    """Where a vocabulary has the sequence breakers of a request."""

    whole: frozenset[int] = frozenset()
    """Tokens with a breaker inside."""
    begun: Mapping[int, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    """By tokens that end with the beginning of a breaker: the tokens that complete it."""


@dataclass(frozen=True, slots=True)
class Dry:
    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    """How many tokens of prompt and answer are looked at; -1: all."""
    breakers: Breakers

    def penalties(self, context: Sequence[int]) -> dict[int, float]:
        """What to subtract from the logits of tokens after `context`."""
        if self.last_n == 0:
            return {}
        window = list(context[-self.last_n :] if self.last_n > 0 else context)
        longest = _since_breaker(window, self.breakers)
        if len(window) <= self.allowed_length or longest < self.allowed_length:
            return {}
        lengths: dict[int, int] = {}
        for end, length in repeats(window, longest):
            token = window[end + 1]
            if (
                length >= self.allowed_length
                and length > lengths.get(token, 0)
                and token not in self.breakers.whole
            ):
                lengths[token] = length
        return {token: self._penalty(length) for token, length in lengths.items()}

    def _penalty(self, length: int) -> float:
        exponent = length - self.allowed_length
        if exponent * math.log(self.base) > math.log(_LARGEST_PENALTY):
            return _LARGEST_PENALTY
        return min(self.multiplier * self.base**exponent, _LARGEST_PENALTY)


def _since_breaker(tokens: list[int], breakers: Breakers) -> int:
    """How many tokens stand after the last breaker; of breakers that begin in one token, the longest counts."""
    size = len(tokens)
    for back, token in enumerate(reversed(tokens)):
        if tails := breakers.begun.get(token):
            after = tuple(tokens[size - back : size - back + max(map(len, tails))])
            if found := [len(tail) for tail in tails if after[: len(tail)] == tail]:
                return back - max(found)
        if token in breakers.whole:
            return back
    return size


def repeats(tokens: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """(end, length) of all that ends before the last token and equals the end of `tokens`, as far as `longest`.

    Places are tried one by one, as in most texts few are equal to more than a token or two. Once that has cost a few
    steps per token, the text repeats itself, and the rest is left to an algorithm whose time is linear in any case.
    """
    last, size = tokens[-1], len(tokens)
    work, end = _WORK_PER_TOKEN * size, -1
    while work > 0:
        try:
            end = tokens.index(last, end + 1, size - 1)
        except ValueError:
            return
        length, bound = 1, min(longest, end + 1)
        while length < bound and tokens[end - length] == tokens[size - 1 - length]:
            length += 1
        work -= length
        yield end, length
    for back, length in enumerate(_z_lengths(tokens[::-1])[: size - 1 - end]):
        if back > 0 and length > 0:
            yield size - 1 - back, min(length, longest)


def _z_lengths(items: list[int]) -> list[int]:
    """The Z-algorithm (Gusfield 1997): for each place, how much of what follows equals the beginning."""
    size = len(items)
    lengths, left, right = [size] + [0] * (size - 1), 0, 0
    for place in range(1, size):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < size and items[length] == items[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[place] = length
    return lengths


@lru_cache(maxsize=16)
def find_breakers(tokenizer: ByteTokenizer, texts: tuple[str, ...]) -> Breakers:
    """Where breakers are in the vocabulary: within a token, or begun at a token's end and gone on as the tokenizer
    would write the rest."""
    vocabulary = _vocabulary(tokenizer)
    whole: set[int] = set()
    begun: dict[int, list[tuple[int, ...]]] = {}
    for text in texts:
        breaker = text.encode(errors="surrogatepass")
        holders = vocabulary.containing(breaker)
        whole |= holders
        for cut in range(1, len(breaker)):
            beginners = [each for each in vocabulary.ending(breaker[:cut]) if each not in holders]
            if not beginners or (tail := _tail(tokenizer, breaker, cut)) is None:
                continue
            for token_id in beginners:
                if tail not in (tails := begun.setdefault(token_id, [])):
                    tails.append(tail)
    return Breakers(frozenset(whole), begun)


def _tail(tokenizer: ByteTokenizer, whole: bytes, cut: int) -> tuple[int, ...] | None:
    """The tokens of whole[cut:] in mid-text, as they are written by themselves (after a line break, where a tokenizer
    would put a space before them), or else as they end `whole`: a cut may go through a character. None: neither."""
    rest = whole[cut:]
    for text in (rest, b"\n" + rest, whole, b"\n" + whole):
        try:
            ids = tokenizer.encode(text.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            continue
        num_bytes, start = 0, len(ids)
        while start > 0 and num_bytes < len(rest):
            start -= 1
            num_bytes += len(tokenizer.token_bytes(ids[start]))
        if b"".join(map(tokenizer.token_bytes, ids[start:])) == rest:
            return tuple(ids[start:])
    return None


class _Vocabulary:
    """The bytes of all tokens, also sorted by their ends."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._texts = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        # one character for each byte, so that there is one that comes after all of them
        backward = sorted(
            (text[::-1].decode("latin-1"), token_id) for token_id, text in enumerate(self._texts)
        )
        self._backward = [text for text, _ in backward]
        self._backward_ids = [token_id for _, token_id in backward]

    def containing(self, part: bytes) -> set[int]:
        return {token_id for token_id, text in enumerate(self._texts) if part in text}

    def ending(self, part: bytes) -> list[int]:
        backward = part[::-1].decode("latin-1")
        first, end = (
            bisect_left(self._backward, backward),
            bisect_left(self._backward, backward + _AFTER_BYTES),
        )
        return self._backward_ids[first:end]


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: ByteTokenizer) -> _Vocabulary:
    return _Vocabulary(tokenizer)
