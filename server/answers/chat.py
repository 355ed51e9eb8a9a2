"""The chunks of /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any

from cadenza.decoding.request import Delta, PromptDone
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.answers.answer import ENDINGS, Answer, Chunk, append_to, ending
from cadenza.server.answers.explanation import explanation
from cadenza.server.answers.logprobs import chat_logprobs, prompt_logprobs
from cadenza.server.protocol.chat import ChatRequest


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self,
        body: ChatRequest,
        tokenizer: Tokenizer,
        prompt_token_ids: tuple[int, ...],
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        super().__init__(model=model, fingerprint=fingerprint, running_usage=body.includes_running_usage)
        self._body = body
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._opened: set[int] = set()

    def _begin(self, prompt_index: int, event: PromptDone) -> Iterator[Chunk]:
        """The first chunk also brings what was asked of the prompt."""
        members: dict[str, Any] = {}
        if self._body.return_token_ids:
            members["prompt_token_ids"] = list(self._prompt_token_ids)
        if self._body.prompt_logprobs is not None:
            members["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, event.logprobs or (), self._body.prompt_logprobs
            )
        for index in range(1 if self._body.ends_together else self._body.n):
            yield from self._open(index, **(members if index == 0 else {}))

    def _open(self, index: int, **members: Any) -> Iterator[Chunk]:
        """The role, once per choice."""
        if index not in self._opened:
            self._opened.add(index)
            content = self._body.messages[-1].content if self._body.echo else ""
            yield self._chunk(_choice(index, {"role": "assistant", "content": content}), **members)

    def _advance(self, prompt_index: int, event: Delta) -> Iterator[Chunk]:
        yield from self._open(event.index)
        news: dict[str, Any] = {}
        if self._body.return_token_ids:
            news["token_ids"] = list(event.token_ids)
        if self._body.num_alternatives is not None and event.logprobs:
            content = chat_logprobs(self._tokenizer, event.logprobs, self._body.num_alternatives)
            news["logprobs"] = {"content": content, "refusal": None}
        if event.explanations:
            news["explanation"] = explanation(self._tokenizer, event.explanations)
        if event.text or (event.token_ids and news):
            yield self._chunk(_choice(event.index, {"content": event.text}, **news))
        if event.finish_reason is not None:
            yield self._chunk(_choice(event.index, {}, **ending(event)))

    def _no_news(self, index: int) -> dict[str, Any]:
        return _choice(index, {})

    def _fold_choice(self, choice: dict[str, Any], news: dict[str, Any]) -> None:
        message = choice.setdefault("message", {"role": "assistant", "content": "", "refusal": None})
        message["content"] += news["delta"].get("content") or ""
        if "logprobs" not in choice:
            choice["logprobs"] = {"content": [], "refusal": None} if self._body.logprobs else None
        if news["logprobs"]:
            choice["logprobs"]["content"] += news["logprobs"]["content"]
        append_to(choice, "token_ids", news)
        if self._body.explain:
            choice.setdefault("explanation", [])
            append_to(choice, "explanation", news)
        choice["finish_reason"] = news["finish_reason"]
        for name in ENDINGS:
            if name in news:
                choice[name] = news[name]


def _choice(index: int, delta: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **members}
