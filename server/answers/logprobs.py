"""Log-probabilities as the two APIs write them, and as vLLM writes those of a prompt."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from cadenza.decoding.request import TokenLogprob
from cadenza.models.tokenizer import Tokenizer

MINUS_INFINITY = -9999.0
"""JSON has no infinity."""


def finite(logprob: float) -> float:
    return max(logprob, MINUS_INFINITY)


def chat_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprob], num_alternatives: int
) -> list[dict[str, Any]]:
    """The `content` of a chat choice's `logprobs`."""
    return [
        {
            **_chat_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, *pair) for pair in entry.top[:num_alternatives]],
        }
        for entry in entries
    ]


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_string(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], num_alternatives: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token, what the model thought of it and of the likeliest others."""
    return [None if entry is None else _prompt_entry(tokenizer, entry, num_alternatives) for entry in entries]


def _prompt_entry(tokenizer: Tokenizer, entry: TokenLogprob, num_alternatives: int) -> dict[str, Any]:
    ranked = [
        (token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_alternatives], 1)
    ]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_string(token_id),
        }
        for token_id, logprob, rank in ranked
    }


class CompletionLogprobs:
    """The `logprobs` of one completion choice, chunk by chunk; `text_offset` runs on from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], text: str
    ) -> dict[str, Any]:
        """`token_ids` and `entries` are of equal length; `text` is the prompt as echoed."""
        wire = self._wire(token_ids, entries)
        self._offset = len(text)
        self._utf8.reset()
        return wire

    def completion(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._wire([entry.token_id for entry in entries], entries)

    def _wire(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [entry and finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._alternatives(entry) for entry in entries],
            "text_offset": [self._advance(token_id) for token_id in token_ids],
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """Best first, the chosen token always among them. Where names collide, the likelier one stays."""
        named: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._num_alternatives], (entry.token_id, entry.logprob)):
            named.setdefault(self._name(token_id), finite(logprob))
        return named

    def _name(self, token_id: int) -> str:
        """The token's text; `bytes:\\xe2\\x98` for a part of a character, as OpenAI's API has it, so that two
        such tokens stay two entries in `top_logprobs`."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _advance(self, token_id: int) -> int:
        """The number of characters before this token."""
        before = self._offset
        if token_id not in self._hidden:
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return before
