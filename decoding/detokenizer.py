"""From tokens to text that is safe to send: no broken UTF-8 character, no part of a stop string.

`IncrementalDetokenizer` turns tokens into text as soon as the text is certain; `StopStringFilter` holds back
what may yet become a stop string; `TextStream` is one behind the other. They know nothing of requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

_CONTEXT = 6  # tokens before the new ones, which decide how those are joined (a leading space, an accent)
_LONGEST_CHARACTER = 4  # bytes
_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """Decodes a window of recent tokens again with each new one, and emits what has been added to its text.

    Independent of the kind of tokenizer; constant work per token. U+FFFD at the end of the text is held back, as it
    may be an unfinished character, up to as many as one could be.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt[-_CONTEXT:])
        # Characters of the window's text that are out. A prompt may end inside one: that is the answer's to send.
        self._num_sent = len(self._decode().rstrip(_REPLACEMENT))

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain."""
        self._window.append(token_id)
        text = self._decode()
        num_open = min(len(text) - len(text.rstrip(_REPLACEMENT)), _LONGEST_CHARACTER)
        return self._send(text, len(text) - num_open)

    def flush(self) -> str:
        """What was held back; an unfinished character comes out as U+FFFD."""
        text = self._decode()
        return self._send(text, len(text))

    def _send(self, text: str, end: int) -> str:
        piece = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        if len(self._window) >= 2 * _CONTEXT:
            num_held = len(text) - self._num_sent
            self._window = self._window[-_CONTEXT:]
            self._num_sent = max(0, len(self._decode()) - num_held)
        return piece

    def fork(self) -> "IncrementalDetokenizer":
        copy = IncrementalDetokenizer(self._decoder, (), self._skip_special_tokens)
        copy._window, copy._num_sent = list(self._window), self._num_sent
        return copy


class StopStringFilter:
    """Passes text on, except a tail that may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to emit, the stop string found or None). After a find nothing may be pushed."""
        if not self._stop:
            return text, None
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            # The match that completes first ends the text; of two that complete together, the one that began first.
            at, stop = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))
            safe = self._held[: at + len(stop) if self._include else at]
            self._held = ""
            return safe, stop
        keep = max(self._overlap(stop) for stop in self._stop)
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe, None

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def fork(self) -> "StopStringFilter":
        copy = StopStringFilter(self._stop, self._include)
        copy._held = self._held
        return copy


@dataclass(slots=True)
class TextStream:
    """Tokens in, certain text out. `stop_string` is set by the push that completes one."""

    detokenizer: IncrementalDetokenizer
    stops: StopStringFilter
    stop_string: str | None = field(default=None, init=False)

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that `token_id` makes certain. may_stop=False: stop strings are plain text (min_tokens)."""
        text = self.detokenizer.push(token_id)
        if not may_stop:
            return text
        text, self.stop_string = self.stops.push(text)
        return text

    def flush(self) -> str:
        """Everything held back, at the end of a branch that no stop string ended."""
        if self.stop_string is not None:
            return ""
        text, self.stop_string = self.stops.push(self.detokenizer.flush())
        return text + self.stops.flush() if self.stop_string is None else text

    def fork(self) -> "TextStream":
        return TextStream(self.detokenizer.fork(), self.stops.fork())
