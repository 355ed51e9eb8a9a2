"""The chunks of /v1/completions, `echo` and batches of prompts included."""

from collections.abc import Iterator, Sequence
from typing import Any

from cadenza.decoding.request import Delta, PromptDone
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.answers.answer import ENDINGS, Answer, Chunk, append_to, ending
from cadenza.server.answers.explanation import explanation
from cadenza.server.answers.logprobs import CompletionLogprobs, prompt_logprobs
from cadenza.server.prompts import Prompt
from cadenza.server.protocol.completion import CompletionRequest


class CompletionAnswer(Answer):
    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        super().__init__(model=model, fingerprint=fingerprint, running_usage=body.includes_running_usage)
        self._body = body
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._prompts_done: dict[int, PromptDone] = {}
        self._opened: set[int] = set()

    def _index(self, prompt_index: int, choice_index: int) -> int:
        return prompt_index * self._body.n + choice_index

    def _begin(self, prompt_index: int, event: PromptDone) -> Iterator[Chunk]:
        self._prompts_done[prompt_index] = event
        for choice_index in range(1 if self._body.ends_together else self._body.n):
            yield from self._open(prompt_index, choice_index)

    def _open(self, prompt_index: int, choice_index: int) -> Iterator[Chunk]:
        """The echo, and what was asked of the prompt, once per choice; nothing where nothing was."""
        index = self._index(prompt_index, choice_index)
        if index in self._opened:
            return
        self._opened.add(index)
        prompt, logprobs = self._prompts[prompt_index], self._prompts_done[prompt_index].logprobs or ()
        news: dict[str, Any] = {}
        if self._body.return_token_ids:
            news["prompt_token_ids"] = list(prompt.token_ids)
        if self._body.prompt_logprobs is not None:
            news["prompt_logprobs"] = prompt_logprobs(self._tokenizer, logprobs, self._body.prompt_logprobs)
        if self._body.echo and self._body.logprobs is not None:
            writer = self._writer(index, self._body.logprobs)
            news["logprobs"] = writer.prompt(prompt.token_ids, logprobs, prompt.text)
        if self._body.echo or news:
            yield self._chunk(_choice(index, prompt.text if self._body.echo else "", **news))

    def _advance(self, prompt_index: int, event: Delta) -> Iterator[Chunk]:
        yield from self._open(prompt_index, event.index)
        index = self._index(prompt_index, event.index)
        news: dict[str, Any] = {}
        if self._body.return_token_ids:
            news["token_ids"] = list(event.token_ids)
        if self._body.logprobs is not None and event.logprobs:
            news["logprobs"] = self._writer(index, self._body.logprobs).completion(event.logprobs)
        if event.explanations:
            news["explanation"] = explanation(self._tokenizer, event.explanations)
        if event.finish_reason is not None:
            news.update(ending(event))
        if event.text or event.finish_reason is not None or (event.token_ids and news):
            yield self._chunk(_choice(index, event.text, **news))

    def _writer(self, index: int, num_alternatives: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(
                self._tokenizer,
                num_alternatives,
                skip_special_tokens=self._body.skip_special_tokens is not False,
            )
        return self._logprobs[index]

    def _no_news(self, index: int) -> dict[str, Any]:
        return _choice(index, "")

    def _fold_choice(self, choice: dict[str, Any], news: dict[str, Any]) -> None:
        choice["text"] = choice.get("text", "") + news["text"]
        if "logprobs" not in choice:
            choice["logprobs"] = None if self._body.logprobs is None else _no_logprobs()
        for name, values in (news["logprobs"] or {}).items():
            choice["logprobs"][name] += values
        append_to(choice, "token_ids", news)
        if self._body.explain:
            choice.setdefault("explanation", [])
            append_to(choice, "explanation", news)
        choice["finish_reason"] = news["finish_reason"]
        for name in (*ENDINGS, "prompt_token_ids", "prompt_logprobs"):
            if name in news:
                choice[name] = news[name]


def _choice(index: int, text: str, **members: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, **members}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
