"""Answers for scripts: the events of a request folded into plain values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cadenza.decoding.request import (
    Delta,
    Event,
    FinishReason,
    PromptDone,
    TokenExplanation,
    TokenLogprob,
    Unsent,
    VoteProgress,
)
from cadenza.models import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages."""


@dataclass(slots=True)
class CompletionChoice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_forced_tokens: int = 0
    """Tokens that a constraint left no alternative to."""
    closed_early: bool | None = None
    """Under a constraint: whether the budget of tokens decided how the text ends."""
    explanations: list[TokenExplanation] = field(default_factory=list)
    """One per token, where they were asked for."""
    score: float | None = None
    """What the strategy ranked the choice by, if it ranks."""


@dataclass(slots=True)
class Completion:
    choices: list[CompletionChoice]
    """Fewer than were asked for where a search has found no more."""
    prompt: PromptDone | None = None
    vote: VoteProgress | None = None
    """The outcome of self-consistency."""
    num_unsent_tokens: int = 0
    """Generated for answers that are not among the choices."""

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text


def collect(events: Iterable[Event], n: int) -> Completion:
    """Fold a request's events, which bring up to `n` choices. Raises what iterating them raises."""
    choices = [CompletionChoice() for _ in range(n)]
    came: set[int] = set()
    completion = Completion(choices)
    for event in events:
        match event:
            case PromptDone():
                completion.prompt = event
            case Delta():
                came.add(event.index)
                _add(choices[event.index], event)
            case VoteProgress():
                completion.vote = event
            case Unsent():
                completion.num_unsent_tokens += event.num_tokens
    completion.choices = [choice for index, choice in enumerate(choices) if index in came] or choices[:1]
    return completion


def _add(choice: CompletionChoice, delta: Delta) -> None:
    choice.text += delta.text
    choice.token_ids += delta.token_ids
    choice.logprobs += delta.logprobs or ()
    choice.finish_reason = delta.finish_reason
    choice.stop_reason = delta.stop_reason
    choice.num_forced_tokens += delta.num_forced_tokens
    choice.closed_early = delta.closed_early
    choice.explanations += delta.explanations or ()
    choice.score = delta.score


def prompt_token_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Token ids as they are; messages through the model's chat template."""
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    if prompt and isinstance(prompt[0], Mapping):
        text = tokenizer.render_chat([dict(message) for message in prompt])  # type: ignore[arg-type]
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(prompt)  # type: ignore[arg-type]
