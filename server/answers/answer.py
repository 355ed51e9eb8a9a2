"""What chat and completion answers have in common: the envelope, the order of chunks, the fold.

Both the streamed and the whole answer are made of the chunks of `Answer.chunks`; `fold` joins them, so
that the two cannot differ. Nothing here knows HTTP.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any

from cadenza.decoding.request import Delta, Event, PromptDone, VoteProgress
from cadenza.server.answers import vote
from cadenza.server.answers.logprobs import finite
from cadenza.server.answers.usage import Usage

Chunk = dict[str, Any]


class Answer(ABC):
    """One answer in the making. `id` and `created` are the same in all of its chunks."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def __init__(self, *, model: str, fingerprint: str, running_usage: bool = False) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._running_usage = running_usage
        self._usage = Usage()
        self._votes: dict[int, dict[str, Any]] = {}
        """Decided, by prompt."""

    @property
    def id(self) -> str:
        return str(self._head["id"])

    async def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[Chunk]:
        """Every chunk of the stream, the last one with `choices: []` and the usage."""
        async for prompt_index, event in events:
            self._usage.count(event)
            for chunk in self._chunks_of(prompt_index, event):
                chunk["usage"] = self._usage.wire() if self._running_usage else None
                yield chunk
        yield {**self._head, "choices": [], "usage": self._usage.wire()}

    def _chunks_of(self, prompt_index: int, event: Event) -> Iterator[Chunk]:
        match event:
            case PromptDone():
                yield from self._begin(prompt_index, event)
            case Delta():
                for chunk in self._advance(prompt_index, event):
                    is_last = chunk["choices"][0]["finish_reason"] is not None
                    yield {**chunk, "vote": self._votes[prompt_index]} if is_last and self._votes else chunk
            case VoteProgress(is_final=True):
                self._votes[prompt_index] = vote.outcome(event)
            case VoteProgress():
                yield self._chunk(self._no_news(prompt_index), vote=vote.progress(event))

    @abstractmethod
    def _begin(self, prompt_index: int, event: PromptDone) -> Iterator[Chunk]:
        """The chunks that go before a prompt's first token."""

    @abstractmethod
    def _advance(self, prompt_index: int, event: Delta) -> Iterator[Chunk]:
        """The chunks that bring the news of one choice."""

    @abstractmethod
    def _no_news(self, index: int) -> dict[str, Any]:
        """A choice of which a chunk says nothing."""

    def _chunk(self, choice: dict[str, Any], **members: Any) -> Chunk:
        return {**self._head, "choices": [choice], **members}

    async def fold(self, chunks: AsyncIterator[Chunk]) -> dict[str, Any]:
        """The whole answer that a client would have put together from the stream; `votes` where prompts are several."""
        choices: dict[int, dict[str, Any]] = {}
        votes: dict[int, dict[str, Any]] = {}
        whole: dict[str, Any] = {}
        async for chunk in chunks:
            if "vote" in chunk:
                votes[chunk["choices"][0]["index"]] = chunk.pop("vote")
            for news in chunk["choices"]:
                self._fold_choice(choices.setdefault(news["index"], {"index": news["index"]}), news)
            whole.update(chunk)
        whole["object"] = self.whole_object
        whole["choices"] = [choices[index] for index in sorted(choices)]
        if len(votes) == 1:
            (whole["vote"],) = votes.values()
        elif votes:
            whole["votes"] = [votes[index] for index in sorted(votes)]
        return whole

    @abstractmethod
    def _fold_choice(self, choice: dict[str, Any], news: dict[str, Any]) -> None:
        """Add what one chunk says of a choice to what is known of it."""


def ending(event: Delta) -> dict[str, Any]:
    """How a choice ended, in its last chunk."""
    members: dict[str, Any] = {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
    if event.closed_early is not None:
        members["closed_early"] = event.closed_early
    if event.score is not None:
        members["score"] = finite(event.score)
    return members


ENDINGS = ("stop_reason", "closed_early", "score")
"""What `ending` may say beside the finish reason."""


def append_to(choice: dict[str, Any], name: str, news: dict[str, Any]) -> None:
    """Join a list that chunks bring in pieces."""
    if name in news:
        choice.setdefault(name, []).extend(news[name])
