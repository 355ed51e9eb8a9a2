"""The life of one request inside the engine: its branches, their text, when they end, what its stream is told.

Knows the model's ends and the request's parameters; no tensors but the prompt's scores, no blocks, no threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadenza.decoding.branch import Branch
from cadenza.decoding.logits import Choice, Row
from cadenza.decoding.request import (
    Delta,
    Event,
    FinishReason,
    GenerationRequest,
    PromptDone,
    RequestError,
    RequestFailed,
    TokenLogprob,
)
from cadenza.decoding.strategies import Strategy
from cadenza.decoding.stream import RequestStream


@dataclass(slots=True, eq=False)
class Generation:
    request: GenerationRequest
    stream: RequestStream
    strategy: Strategy
    root: Branch
    seed: int
    max_tokens: int
    eos_token_ids: frozenset[int]
    bad_words: Sequence[Sequence[int]]
    branches: list[Branch] = field(default_factory=list)
    """Empty until the prompt is computed."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    _events: list[Event] = field(default_factory=list)

    @property
    def is_begun(self) -> bool:
        return bool(self.branches)

    @property
    def is_finished(self) -> bool:
        return self.is_begun and all(branch.is_finished for branch in self.branches)

    def begin(self) -> list[Branch]:
        """The prompt is computed. Returns the branches that the strategy wants tokens for, if any are allowed."""
        wants_logprobs = self.request.sampling.prompt_logprobs is not None
        self._events.append(
            PromptDone(
                num_prompt_tokens=self.root.num_prompt_tokens,
                num_cached_tokens=self.root.num_cached_tokens or 0,
                logprobs=tuple(self.prompt_logprobs) if wants_logprobs else None,
            )
        )
        self.branches = self.strategy.begin(self.root)
        if self.max_tokens == 0:
            for branch in self.branches:
                self._finish(branch, "length")
                self._events.append(Delta(branch.index, "", finish_reason="length"))
            return []
        return self.branches

    def row(self, branch: Branch, logits_row: int) -> Row:
        params = self.request.sampling
        return Row(
            logits_row=logits_row,
            sampling=params,
            seed=self.seed,
            branch=branch.index,
            prompt=branch.token_ids[: branch.num_prompt_tokens] if params.repetition_penalty != 1.0 else (),
            generated=branch.generated,
            banned=self._banned(branch),
            num_logprobs=params.logprobs,
        )

    def _banned(self, branch: Branch) -> list[int]:
        params = self.request.sampling
        banned: list[int] = []
        if branch.num_generated < params.min_tokens:
            banned += [*self.eos_token_ids, *params.stop_token_ids]
        generated = branch.generated if self.bad_words else []
        for word in self.bad_words:
            *head, last = word
            if not head or generated[-len(head) :] == head:
                banned.append(last)
        return banned

    def advance(self, results: Sequence[tuple[Branch, Choice]]) -> None:
        """Apply one step's results. Raises RequestError or RequestFailed if a branch has no token to go on with."""
        for action in self.strategy.advance(results):
            token_id, logprob = action.choice.token_id, action.choice.logprob
            if token_id is None:
                raise self._no_token()
            self._append(action.branch, token_id, logprob)

    def _no_token(self) -> Exception:
        params = self.request.sampling
        for name in ("allowed_token_ids", "bad_words", "min_tokens"):
            if getattr(params, name):
                return RequestError(
                    f"{name} leaves no token to go on with, together with the request's other limits", name
                )
        return RequestFailed("the model's logits are not numbers")

    def _append(self, branch: Branch, token_id: int, logprob: TokenLogprob | None) -> None:
        branch.token_ids.append(token_id)
        text = self._text_and_end(branch, token_id)
        if branch.is_finished:
            text += branch.text.flush()
            if branch.text.stop_string is not None and branch.stop_reason is None:
                self._finish(branch, "stop", branch.text.stop_string)
        self._events.append(
            Delta(
                branch.index,
                text,
                (token_id,),
                None if logprob is None else (logprob,),
                branch.finish_reason,
                branch.stop_reason,
            )
        )

    def _text_and_end(self, branch: Branch, token_id: int) -> str:
        """The text that the token makes certain; marks the branch finished where the token ends it."""
        params = self.request.sampling
        may_stop = branch.num_generated >= params.min_tokens
        if token_id in self.eos_token_ids and not params.ignore_eos:
            self._finish(branch, "stop")
            return ""
        if token_id in params.stop_token_ids and may_stop:
            self._finish(branch, "stop", token_id)
            return branch.text.push(token_id) if params.include_stop_str_in_output else ""
        text = branch.text.push(token_id, may_stop=may_stop)
        if branch.text.stop_string is not None:
            self._finish(branch, "stop", branch.text.stop_string)
        elif branch.num_generated >= self.max_tokens:
            self._finish(branch, "length")
        return text

    def _finish(self, branch: Branch, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        branch.finish_reason, branch.stop_reason = reason, stop_reason

    def deliver(self) -> None:
        """Hand the step's events to the stream, without waking who awaits them."""
        events, self._events = self._events, []
        self.stream.put(events, is_last=self.is_finished)
