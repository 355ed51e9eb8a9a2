"""The life of one request inside the engine: its branches, their text, when they end, what its stream is told.

Knows the model's ends and the request's parameters; no tensors but the prompt's scores, no blocks, no threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from cadenza.decoding.constraints.matcher import Matcher


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
                self._events.append(
                    Delta(branch.index, "", finish_reason="length", closed_early=_closed_early(branch))
                )
            return []
        return self.branches

    @property
    def num_generated(self) -> int:
        return sum(branch.num_generated for branch in self.branches)

    def remaining(self, branch: Branch) -> int:
        """Tokens that the branch may still be given."""
        return self.max_tokens - branch.num_generated

    def row(self, branch: Branch, logits_row: int, mask: int | None = None) -> Row:
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
            mask=mask,
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
            if action.choice.token_id is None:
                raise self._no_token()
            self._append(action.branch, action.choice, action.choice.token_id)

    def _no_token(self) -> Exception:
        params = self.request.sampling
        for name in ("allowed_token_ids", "bad_words", "min_tokens"):
            if getattr(params, name):
                return RequestError(
                    f"{name} leaves no token to go on with, together with the request's other limits", name
                )
        return RequestFailed("the model's logits are not numbers")

    def _append(self, branch: Branch, choice: Choice, token_id: int) -> None:
        if branch.matcher is None:
            forced: Sequence[int] = ()
            text = self._text_and_end(branch, token_id)
        else:
            forced = self._forced(branch, branch.matcher, token_id)
            text = self._constrained_text_and_end(branch, branch.matcher, (token_id, *forced))
        if branch.is_finished:
            text += branch.text.flush()
            if branch.text.stop_string is not None and branch.stop_reason is None:
                self._finish(branch, "stop", branch.text.stop_string)
        self._events.append(
            Delta(
                branch.index,
                text,
                (token_id, *forced),
                None if choice.logprob is None else (choice.logprob,),
                branch.finish_reason,
                branch.stop_reason,
                num_forced_tokens=choice.is_forced + len(forced),
                closed_early=_closed_early(branch),
            )
        )

    def _forced(self, branch: Branch, matcher: "Matcher", token_id: int) -> Sequence[int]:
        """The tokens to which the constraint leaves no alternative after `token_id`. Where log-probabilities are
        wanted they come one by one, as the model is asked about each of them."""
        if token_id in self.eos_token_ids or branch.pending:
            return ()
        forced = matcher.forced(self.remaining(branch) - 1)
        if self.request.sampling.logprobs is None:
            return forced
        branch.pending = forced
        return ()

    def _text_and_end(self, branch: Branch, token_id: int) -> str:
        """The text that the token makes certain; marks the branch finished where the token ends it."""
        branch.token_ids.append(token_id)
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

    def _constrained_text_and_end(self, branch: Branch, matcher: "Matcher", token_ids: Sequence[int]) -> str:
        """The constraint, the model's EOS and the budget are all that may end the text: never in its middle."""
        branch.token_ids += token_ids
        is_eos = token_ids[0] in self.eos_token_ids
        text = "" if is_eos else "".join(branch.text.push(token_id) for token_id in token_ids)
        if is_eos or (matcher.is_ended and not branch.pending):
            self._finish(branch, "length" if matcher.limited else "stop")
        elif branch.num_generated >= self.max_tokens:
            if not matcher.is_complete:
                raise RequestFailed("the constraint's text is not complete at the end of its tokens")
            self._finish(branch, "length")
        return text

    def _finish(self, branch: Branch, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        branch.finish_reason, branch.stop_reason = reason, stop_reason

    def deliver(self) -> None:
        """Hand the step's events to the stream, without waking who awaits them."""
        events, self._events = self._events, []
        self.stream.put(events, is_last=self.is_finished)


def _closed_early(branch: Branch) -> bool | None:
    """Whether the budget decided how a constrained text ends; None for other texts, and before the end."""
    if branch.matcher is None or not branch.is_finished:
        return None
    return branch.finish_reason == "length"
