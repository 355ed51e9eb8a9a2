"""The tokenizer that an adapter's folder brings: the same as the model's, one with more tokens, or another template.

Loading one takes long, so the files are compared first. Knows no weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from cadenza.models.errors import ModelError
from cadenza.models.tokenizer import Tokenizer

_TOKENS, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = (_TEMPLATE, "added_tokens.json", "special_tokens_map.json", _TOKENS, _SETTINGS)
_UNUSED_ROLES = ("pad_token",)
"""Prompts are never padded; training scripts like to change it."""


_KNOWN: WeakKeyDictionary[Tokenizer, WeakValueDictionary[str, Tokenizer]] = WeakKeyDictionary()
"""Those that adapters in memory have brought, by the model's and by `files_digest`."""


def read_tokenizer(folder: Path, tokenizer: Tokenizer) -> Tokenizer | None:
    """tokenizer: the model's. None: nothing differs. Equal files give the same object, so that adapters that bring the
    same tokenizer can be used together. Raises `ModelError` where the model's ids would change their meaning."""
    known, digest = _KNOWN.setdefault(tokenizer, WeakValueDictionary()), files_digest(folder)
    found = known.get(digest) or _read(folder, tokenizer)
    if found is not None:
        known[digest] = found
    return found


def _read(folder: Path, tokenizer: Tokenizer) -> Tokenizer | None:
    settings = _settings(folder)
    template = None if tokenizer.has_own_template else _template(folder, settings)
    found = tokenizer
    if not _is_same(folder, settings, tokenizer):
        found = _loaded(folder, tokenizer)
        if _roles(found) == _roles(tokenizer) and found.digest == tokenizer.digest:
            found = tokenizer
    wanted = tokenizer.chat_template if template is None else template
    if wanted is not None and wanted != found.chat_template:
        found = found.with_chat_template(wanted)
    return None if found is tokenizer else found


def has_tokenizer(folder: Path) -> bool:
    return (folder / _TOKENS).is_file()


def files_digest(folder: Path) -> str:
    """Of all that decides what `read_tokenizer` finds."""
    sha = hashlib.sha256()
    for name in _FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            sha.update(f"{name} {len(content)}\n".encode())
            sha.update(content)
    return sha.hexdigest()


def _is_same(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """By the files. False: only a tokenizer made from them can tell."""
    file = folder / _TOKENS
    if not file.is_file():
        return True
    if _roles_of(settings) != _roles(tokenizer):
        return False
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() == tokenizer.digest:
        return True
    try:
        return _tokens_only(content.decode()) == _tokens_only(tokenizer.serialized())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the adapter's {_TOKENS} cannot be read as JSON") from error


def _tokens_only(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError
    return {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}


def _loaded(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    try:
        found = Tokenizer.from_folder(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), "the adapter's folder")) from error
    own, theirs = tokenizer.vocabulary(), found.vocabulary()
    if not own.items() <= theirs.items():
        token = min((token for token in own if theirs.get(token) != own[token]), key=own.__getitem__)
        other = next((name for name, place in theirs.items() if place == own[token]), None)
        raise ModelError(
            f"the adapter's tokenizer has {other!r} for token {own[token]}, the model's has {token!r}"
        )
    changed = (place for place in own.values() if found.token_bytes(place) != tokenizer.token_bytes(place))
    if (first := min(changed, default=None)) is not None:
        raise ModelError(
            f"the adapter's tokenizer has {found.token_bytes(first)!r} for token {first}, the model's has "
            f"{tokenizer.token_bytes(first)!r}"
        )
    return found


def _settings(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the adapter's {_SETTINGS} cannot be read as JSON") from error
    return content if isinstance(content, dict) else {}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default one, where the folder has several."""
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _roles(tokenizer: Tokenizer) -> dict[str, str]:
    return {role: token for role, token in tokenizer.special_tokens.items() if role not in _UNUSED_ROLES}


def _roles_of(settings: dict[str, Any]) -> dict[str, str]:
    tokens = {role: value for role, value in settings.items() if role.endswith("_token")}
    contents = {
        role: value["content"] if isinstance(value, dict) and "content" in value else value
        for role, value in tokens.items()
    }
    return {
        role: text for role, text in contents.items() if isinstance(text, str) and role not in _UNUSED_ROLES
    }
