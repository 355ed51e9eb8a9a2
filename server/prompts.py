"""From texts, token ids and messages to prompts of token ids. It knows nothing of sampling or of answers.

Long texts are tokenized on a thread, so that one long prompt does not hold up everyone's streams.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cadenza.decoding.request import RequestError
from cadenza.models.tokenizer import ChatTemplateError, Tokenizer
from cadenza.server.protocol.chat import ChatPrompt
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.sampling import SamplingFields, check_token_ids

LONG_TEXT = 4096
"""Characters above which tokenizing takes longer (about a millisecond) than handing it to a thread."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    text: str
    """What `echo` repeats."""


async def _off_loop(length: int, work: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(work) if length > LONG_TEXT else work()


async def chat_prompt(tokenizer: Tokenizer, body: ChatPrompt) -> tuple[int, ...]:
    """The messages through the model's chat template, then through its tokenizer."""
    # A client's own template may take its time, whatever the length of the messages.
    length = sum(len(message.content or "") for message in body.messages) + LONG_TEXT * bool(
        body.chat_template
    )
    return await _off_loop(length, lambda: _render_and_encode(tokenizer, body))


def _render_and_encode(tokenizer: Tokenizer, body: ChatPrompt) -> tuple[int, ...]:
    template = body.chat_template or tokenizer.chat_template or ""
    messages = [
        message.for_template(developer_as_system="developer" not in template) for message in body.messages
    ]
    try:
        text = tokenizer.render_chat(
            messages,
            add_generation_prompt=body.opens_an_answer,
            continue_final_message=body.continue_final_message,
            chat_template=body.chat_template,
            template_kwargs=body.chat_template_kwargs,
        )
    except ChatTemplateError as error:
        raise RequestError(str(error), _suspect(body)) from None
    return tuple(tokenizer.encode(text, add_special_tokens=body.add_special_tokens))


def _suspect(body: ChatPrompt) -> str:
    """The field most likely at fault when a template does not render: the rarest of those given."""
    if body.chat_template_kwargs:
        return "chat_template_kwargs"
    return "chat_template" if body.chat_template else "messages"


async def completion_prompts(tokenizer: Tokenizer, body: CompletionRequest, context: int) -> list[Prompt]:
    """All prompts of the call, each cut as `truncated` says."""
    length = sum(len(prompt) for prompt in body.prompt)
    return await _off_loop(
        length, lambda: [_completion_prompt(tokenizer, body, prompt, context) for prompt in body.prompt]
    )


def _completion_prompt(
    tokenizer: Tokenizer, body: CompletionRequest, prompt: str | list[int], context: int
) -> Prompt:
    if isinstance(prompt, str):
        whole = tuple(tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens))
    else:
        check_token_ids(prompt, "prompt", tokenizer.vocab_size)
        whole = tuple(prompt)
    token_ids = truncated(whole, body, body.new_tokens, context)
    if not body.echo:
        return Prompt(token_ids, "")
    if isinstance(prompt, str) and token_ids == whole:
        return Prompt(token_ids, prompt)
    return Prompt(token_ids, tokenizer.decode(token_ids, skip_special_tokens=False))


def truncated(
    token_ids: tuple[int, ...], body: SamplingFields, max_tokens: int | None, context: int
) -> tuple[int, ...]:
    """The prompt, cut from the left if the client asked so. Whether it then fits is for the engine to say."""
    keep = body.truncate_prompt_tokens
    if keep == -1:
        keep = max(1, context - (1 if max_tokens is None else max_tokens))
    return token_ids if keep is None else token_ids[-keep:]


async def text_prompt(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    return await _off_loop(
        len(text), lambda: tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    )
