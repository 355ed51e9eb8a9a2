"""Which transformers class runs a configuration, and which configurations cannot work here at all.

Only decoder-only language models do: each token sees the ones before it, through attention over a KV cache.
That a class goes through transformers' attention registry is the engine's check, not this one's.
"""

import json
from pathlib import Path
from typing import Any

from cadenza.models.errors import ModelError, one_line

LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "max_seq_len",
)


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged file, an unknown model_type
        if not trust_remote_code and (code := _own_code(folder)):
            raise ModelError(
                f"{folder} needs its author's code ({code}); pass --trust-remote-code if you trust it"
            ) from error
        raise ModelError(f"the configuration in {folder} cannot be used: {one_line(error)}") from error


def _own_code(folder: Path) -> str | None:
    """The Python class that the model's configuration asks for, if it asks for one of its own."""
    try:
        code = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]["AutoConfig"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(code)


def causal_lm_class(config: Any, *, trust_remote_code: bool) -> Any:
    """The class to load, or a `ModelError` that names the architecture and what is wrong with it."""
    name = (config.architectures or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only language models can be served"
        )
    own_classes = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in own_classes:
        return _remote_class(config, own_classes["AutoModelForCausalLM"])
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(f"{name} is not a decoder-only language model that transformers knows") from None
    if config.architectures and model_class.__name__ not in config.architectures:
        raise ModelError(f"{name} has no language-model head; {model_class.__name__} would be needed")
    # a decoder's configuration may say so, too (GPT-NeoX), but no decoder is trained to fill in masked words
    if getattr(config, "is_decoder", True) is False and type(config) in AutoModelForMaskedLM._model_mapping:
        raise ModelError(f"{name} is an encoder (its config says is_decoder: false), not a language model")
    if getattr(model_class, "_is_stateful", False):
        raise ModelError(f"{name} keeps a recurrent state instead of a KV cache, which is not supported")
    return model_class


def _remote_class(config: Any, reference: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, config._name_or_path, local_files_only=True)
    except Exception as error:  # whatever the model's own code does when it is imported
        raise ModelError(f"the model's own code ({reference}) cannot be loaded: {one_line(error)}") from error


def context_length(config: Any, asked: int | None) -> int:
    """Tokens that fit into one sequence: what the configuration allows, or less where less was asked for."""
    allowed = next((int(value) for name in LENGTH_NAMES if (value := getattr(config, name, None))), None)
    rope = getattr(config, "rope_parameters", None) or {}
    if allowed and rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        allowed = max(allowed, int(rope["original_max_position_embeddings"] * rope["factor"]))
    if asked is None:
        if allowed is None:
            raise ModelError(
                "the model's configuration states no context length; say one with --max-model-len"
            )
        return allowed
    if asked < 1:
        raise ModelError(f"--max-model-len {asked} must be at least 1")
    if allowed is not None and asked > allowed:
        raise ModelError(f"--max-model-len {asked} exceeds the {allowed} tokens that the model was made for")
    return asked
