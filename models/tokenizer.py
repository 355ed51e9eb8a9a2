"""Text to token ids and back, the bytes of each token, and chat messages to a prompt.

A thin wrapper of a transformers fast tokenizer: what it adds is exact bytes, and errors that a caller can be
shown. It knows nothing of streaming: the incremental detokenizer is the engine's.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cadenza.models.cache import read_manifest
from cadenza.models.errors import ModelError, one_line
from cadenza.models.token_bytes import token_to_bytes


class ChatTemplateError(ValueError):
    """The messages cannot be rendered: no template, or it refused or failed. The caller's mistake."""


class Tokenizer:
    """One model's tokenizer. Safe to share between threads: nothing changes after construction."""

    def __init__(self, fast: Any, *, chat_template: str | None = None) -> None:
        self._fast = fast
        self._backend = fast.backend_tokenizer
        # A truncation or padding saved in tokenizer.json belongs to training, not to a prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._to_bytes = token_to_bytes(self._backend.decoder)
        self._bytes: dict[int, bytes] = {}
        self._override = chat_template

    @classmethod
    def from_folder(
        cls, folder: Path, *, chat_template: str | None = None, trust_remote_code: bool = False
    ) -> "Tokenizer":
        try:
            if read_manifest(folder) is not None:
                fast = _converted(folder)
            else:
                from transformers import AutoTokenizer

                fast = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=trust_remote_code
                )
        except Exception as error:  # any file may be missing or damaged; each fails in its own library's way
            raise ModelError(f"no tokenizer can be loaded from {folder}: {one_line(error)}") from error
        if not getattr(fast, "is_fast", False):
            raise ModelError(
                f"the tokenizer in {folder} has no tokenizer.json, nor can one be made from its files"
            )
        return cls(fast, chat_template=chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens that are written out in the text are recognised, as chat templates need."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_bytes(self, text: bytes) -> list[int] | None:
        """The ids of a piece of text whose tokens stand for exactly these bytes; None where there are none: the
        bytes are no whole characters, or the tokenizer changes or adds to them."""
        try:
            ids = self.encode(text.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return None
        return ids if b"".join(map(self.token_bytes, ids)) == text else None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for in mid-text; none for an id that the vocabulary lacks."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_string(self, token_id: int) -> str:
        """The token for people to read: bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self.special_ids:
            return self._added[token_id].content.encode()  # type: ignore[no-any-return]
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else self._to_bytes(token)

    @cached_property
    def _added(self) -> dict[int, Any]:
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        return added

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included; the model's logits may be wider."""
        return int(
            max(self._backend.get_vocab_size(with_added_tokens=True), 1 + max(self._added, default=-1))
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(token_id for token_id, token in self._added.items() if token.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Added to the trained vocabulary, special ones included."""
        return frozenset(self._added)

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self._fast.eos_token_id
        return token_id

    @property
    def bos_token_id(self) -> int | None:
        token_id: int | None = self._fast.bos_token_id
        return token_id

    @property
    def chat_template(self) -> str | None:
        """The template when a request names none: the server's override, else the model's default."""
        template = self._override or self._fast.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template

    @property
    def has_own_template(self) -> bool:
        """The server's, in place of what the model came with."""
        return self._override is not None

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokens, another template. Shares what it can: neither changes."""
        other = copy.copy(self)
        other._override = template
        return other

    @property
    def special_tokens(self) -> dict[str, str]:
        """By their role, as templates see them."""
        return {role: str(token) for role, token in self._fast.special_tokens_map.items()}

    def serialized(self) -> str:
        """As `tokenizer.json` is written."""
        text: str = self._backend.to_str(pretty=True)
        return text

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of `serialized`."""
        return hashlib.sha256(self.serialized().encode()).hexdigest()

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added ones included; a new dictionary."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, rendered in transformers' sandbox. Raises `ChatTemplateError`."""
        extra = dict(template_kwargs or {})
        if reserved := sorted(extra.keys() & self._reserved):
            raise ChatTemplateError(
                f"the server sets {reserved[0]!r} itself; it cannot be a template argument"
            )
        template = chat_template or self._override
        if template is None and self._fast.chat_template is None:
            raise ChatTemplateError(
                "this model has no chat template; use completions, or give a chat_template"
            )
        try:
            prompt: str = self._fast.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=template,
                tools=tools or None,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extra,
            )
        except Exception as error:  # a template is a program: it can fail on the caller's messages in any way
            raise ChatTemplateError(
                f"the chat template cannot render these messages: {one_line(error)}"
            ) from error
        return prompt

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """Names that a template sees and the server owns."""
        own = set(inspect.signature(self._fast.apply_chat_template).parameters)
        return frozenset(
            own | {"messages", "raise_exception", "strftime_now", *self._fast.special_tokens_map}
        )


def _converted(folder: Path) -> Any:
    """The tokenizer of a folder that this loader wrote: with nothing to guess, it takes half the time."""
    from transformers import TokenizersBackend

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: value for name, value in settings.items() if name.endswith("_token")}
    template = folder / "chat_template.jinja"
    return TokenizersBackend(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        **{name: value for name, value in special.items() if isinstance(value, str)},
    )
