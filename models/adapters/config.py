"""What `adapter_config.json` says, as far as it decides what an adapter computes; anything else is refused by name.

Follows peft's `LoraConfig` (0.21). Knows no tensors and no model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from cadenza.models.adapters.locate import CONFIG
from cadenza.models.errors import ModelError

_NEUTRAL = frozenset(
    {
        *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("bias", "fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    }
)
"""They say how the adapter was made, or what the tensors' names and the model's modules say as well."""
_READ = frozenset(
    {
        *(
            "peft_type",
            "task_type",
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
        ),
        *(
            "lora_bias",
            "init_lora_weights",
            "trainable_token_indices",
            "target_parameters",
            "ensure_weight_tying",
        ),
    }
)
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
"""The others put a head of their own on the model. FEATURE_EXTRACTION trains the same layers without any head."""
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the model's weights as they are."""
_SECONDS_PER_PATTERN = 0.5
_TOO_LARGE = 2**31


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Of the input embedding, or by the embedding's name."""
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    base_model_name: str | None = None

    def rank_of(self, name: str) -> int:
        """name: of the module, or of the parameter, as the adapter calls it."""
        return int(_by_pattern(self.rank_pattern, name, self.rank, "rank_pattern"))

    def scaling_of(self, name: str) -> float:
        """LoRA's alpha / r, or rsLoRA's alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha, rank = _by_pattern(self.alpha_pattern, name, self.alpha, "alpha_pattern"), self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def meaning(self) -> str:
        """What of it decides the result, the same text for the same meaning. Patterns keep their order."""
        tokens = self.token_indices
        return json.dumps(
            [
                *(self.rank, self.alpha, list(self.rank_pattern.items()), list(self.alpha_pattern.items())),
                *(self.use_rslora, self.use_dora, self.lora_bias, self.ensure_weight_tying),
                list(tokens.items()) if isinstance(tokens, Mapping) else tokens,
                sorted(self.target_parameters),
            ]
        )


def read_config(folder: Path) -> AdapterConfig:
    """Raises `ModelError` for what cannot be served exactly."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"the adapter has no {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{CONFIG} cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise ModelError(f"{CONFIG} is no JSON object")
    _refuse_kinds(content)
    name = content.get("base_model_name_or_path")
    return AdapterConfig(
        rank=_positive(content, "r", 8),
        alpha=_number(content.get("lora_alpha", 8), "lora_alpha"),
        rank_pattern={key: _integer(value, "rank_pattern") for key, value in _table(content, "rank_pattern")},
        alpha_pattern={
            key: _number(value, "alpha_pattern") for key, value in _table(content, "alpha_pattern")
        },
        use_rslora=_flag(content, "use_rslora"),
        use_dora=_flag(content, "use_dora"),
        lora_bias=_flag(content, "lora_bias"),
        token_indices=_tokens(content.get("trainable_token_indices")),
        target_parameters=_strings(content.get("target_parameters"), "target_parameters"),
        ensure_weight_tying=_flag(content, "ensure_weight_tying"),
        base_model_name=name if isinstance(name, str) else None,
    )


def _refuse_kinds(content: Mapping[str, Any]) -> None:
    if (kind := content.get("peft_type")) != "LORA":
        raise ModelError(f"peft_type {kind!r} is not supported; only LORA is")
    if (task := content.get("task_type")) not in _TASKS:
        raise ModelError(f"task_type {task!r} is not supported; adapters of language models are CAUSAL_LM")
    start = content.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _HARMLESS_STARTS):
        raise ModelError(
            f"init_lora_weights {start!r} changed the model's own weights for training; save the adapter as plain "
            "LoRA (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name in sorted(content.keys() - _READ - _NEUTRAL):
        if content[name] not in (None, False, "", {}, []):
            raise ModelError(f"{name} in {CONFIG} is not supported")
    if content.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelError(f"bias {content['bias']!r} in {CONFIG} is not none, all or lora_only")


def _by_pattern(patterns: Mapping[str, float], name: str, default: float, field_name: str) -> float:
    """The first pattern that fits, as peft's `get_pattern_key` has it: a regular expression for the end of the name,
    from a dot on. Bounded in time, because patterns are somebody else's."""
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", name, timeout=_SECONDS_PER_PATTERN, concurrent=True):
                return value
        except (regex.error, TimeoutError) as error:
            raise ModelError(
                f"{field_name} has {pattern!r}, which is no usable regular expression"
            ) from error
    return default


def _flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{name} in {CONFIG} is {value!r}, not true or false")
    return bool(value)


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _TOO_LARGE:
        raise ModelError(f"{name} in {CONFIG} has {value!r}, which is no positive integer")
    return value


def _positive(content: Mapping[str, Any], name: str, default: int) -> int:
    return _integer(content.get(name, default), name)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _TOO_LARGE:
        raise ModelError(f"{name} in {CONFIG} has {value!r}, which is no number")
    return float(value)


def _table(content: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    table = content.get(name) or {}
    if not isinstance(table, dict):
        raise ModelError(f"{name} in {CONFIG} is no object")
    return list(table.items())


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"{name} in {CONFIG} is no list of names")
    return tuple(value)


def _tokens(value: Any) -> list[int] | dict[str, list[int]] | None:
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _ids(ids) for name, ids in value.items()}
    return _ids(value)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(
        isinstance(item, int) and 0 <= item < _TOO_LARGE for item in value
    ):
        raise ModelError(f"trainable_token_indices in {CONFIG} is no list of token ids")
    if len(set(value)) != len(value):
        raise ModelError(f"trainable_token_indices in {CONFIG} names a token twice")
    return value
