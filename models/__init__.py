"""The loader: where weights come from, their precision, and what the engine needs to know of them.

Names are imported when first used, so that `cadenza --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadenza.models.errors import ModelError
    from cadenza.models.load import LoadConfig, LoadedModel, load_model
    from cadenza.models.source import CachedModel, cached_models, resolve
    from cadenza.models.tokenizer import ChatTemplateError, Tokenizer

_HOMES = {
    "CachedModel": "source",
    "ChatTemplateError": "tokenizer",
    "LoadConfig": "load",
    "LoadedModel": "load",
    "ModelError": "errors",
    "Tokenizer": "tokenizer",
    "cached_models": "source",
    "load_model": "load",
    "resolve": "source",
}

__all__ = [
    "CachedModel",
    "ChatTemplateError",
    "LoadConfig",
    "LoadedModel",
    "ModelError",
    "Tokenizer",
    "cached_models",
    "load_model",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cadenza.models.{_HOMES[name]}"), name)
