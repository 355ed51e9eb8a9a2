"""The body of /v1/completions."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

from pydantic import PlainValidator

from cadenza.decoding.strategies.spec import BestOf
from cadenza.server.protocol.sampling import SamplingFields
from cadenza.server.protocol.strategies import Way

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, each a text or token ids: always a list of prompts."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, token ids, or a list of lists of token ids.")
    if not value:
        raise ValueError("must not be empty.")
    if all(isinstance(prompt, str) for prompt in value) or all(_is_token_ids(prompt) for prompt in value):
        return value
    if [] in value:
        raise ValueError("must not hold an empty prompt.")
    raise ValueError("must hold only strings, only token ids, or only lists of token ids.")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionRequest(SamplingFields):
    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    def _strategies(self) -> Iterator[Way]:
        yield from super()._strategies()
        if self.best_of is not None and self.best_of != self.n:  # as many as are returned: nothing to choose
            yield "best_of", partial(BestOf, best_of=self.best_of)

    @property
    def new_tokens(self) -> int:
        asked = super().new_tokens
        return DEFAULT_MAX_TOKENS if asked is None else asked

    @property
    def alternatives_in_prompt(self) -> int | None:
        """What the engine must know of the prompt: for `prompt_logprobs`, or for `echo` with `logprobs`."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)
