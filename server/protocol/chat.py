"""The body of /v1/chat/completions, and messages as chat templates read them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from cadenza.decoding.request import RequestError
from cadenza.server.protocol.sampling import SamplingFields
from cadenza.server.protocol.wire import Wire

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


def _text(content: Any) -> str:
    """Text, or a list of text parts, joined by line breaks as vLLM does for templates that take a string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError("must be a string or a non-empty list of content parts.")
    return "\n".join(_part_text(part, index) for index, part in enumerate(content))


def _part_text(part: Any, index: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"part {index} must be an object with a type.")
    if kind != "text":
        raise ValueError(f"part {index} has type {kind!r}: only text is supported.")
    unknown = sorted(part.keys() - {"type", "text"})
    if unknown:
        raise ValueError(f"part {index} has the unknown field {unknown[0]!r}.")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"part {index} must have a string as text.")
    return str(part["text"])


def _arguments(value: Any) -> dict[str, Any]:
    """Templates iterate over a call's arguments; on the wire they are a string of JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError:
            raise ValueError("must be a JSON object written as a string.") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object written as a string.")
    return value


class FunctionCall(Wire):
    name: str
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments)]


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    role: Role
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_annotations(cls, value: Any) -> Any:
        """SDKs send an answer's message back with all its members; an empty list says nothing."""
        if isinstance(value, dict) and value.get("annotations") == []:
            return {name: item for name, item in value.items() if name != "annotations"}
        return value

    def for_template(self, *, developer_as_system: bool) -> dict[str, Any]:
        message = self.model_dump(exclude_none=True)
        message.setdefault("content", "")
        if developer_as_system and self.role == "developer":
            message["role"] = "system"
        return message


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatPrompt(Wire):
    """What makes a prompt out of messages; /tokenize takes the same fields."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = False

    def check(self) -> None:
        super().check()
        for index, message in enumerate(self.messages):
            if message.content is None and not message.tool_calls:
                raise RequestError(f"messages[{index}].content is required.", f"messages[{index}].content")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other.",
                "continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise RequestError(
                "continue_final_message needs a last message of role assistant.", "continue_final_message"
            )

    @property
    def opens_an_answer(self) -> bool:
        """Whether the prompt ends with the opening of the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class ChatRequest(SamplingFields, ChatPrompt):
    logprobs: bool = False
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
        if self.echo and not self.continue_final_message:
            raise RequestError("echo repeats the message that continue_final_message continues.", "echo")

    @property
    def num_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def renamed(self) -> dict[str, str]:
        return {**super().renamed, "logprobs": "top_logprobs", "prompt": "messages"}
