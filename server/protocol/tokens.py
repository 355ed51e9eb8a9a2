"""The bodies of /tokenize and /detokenize."""

from typing import Any

from cadenza.decoding.request import RequestError
from cadenza.server.protocol.chat import ChatPrompt, Messages
from cadenza.server.protocol.wire import Wire


class TokenizeRequest(Wire):
    """Either a text, or messages with what a chat request says of their rendering."""

    model: str | None = None
    return_token_strs: bool = False
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("Exactly one of prompt and messages is required.", "prompt")
        if self.prompt is None:
            self.chat.check()
            return
        for name in _CHAT_ONLY:
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is only allowed with messages.", name)

    @property
    def chat(self) -> ChatPrompt:
        """The same fields as a chat request's; None means its defaults."""
        names = ("messages", "add_special_tokens", *_CHAT_ONLY)
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        return ChatPrompt(**asked)


_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[int]
