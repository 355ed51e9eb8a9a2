"""Adapters of every kind, made and saved by peft itself, with weights that are random and not zero.

Loaded by tests/conftest.py, whose fixture `make_adapter` hands it out.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ALL = {"target_modules": "all-linear"}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": ALL,
    "rslora": ALL | {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "patterns": ALL
    | {"rank_pattern": {r".*layers\.0\..*": 2, "o_proj": 6}, "alpha_pattern": {"1.self_attn.q_proj": 32}},
    "dora": ALL | {"use_dora": True},
    "lora_bias": ALL | {"lora_bias": True},
    "bias_lora_only": ALL | {"bias": "lora_only"},
    "bias_all": ALL | {"bias": "all"},
    "saved": ALL | {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "saved_mlp": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["mlp"]},
    "saved_embeddings": ALL | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied_embeddings": ALL | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora_embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
    "tied_lora": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": ALL | {"trainable_token_indices": [7, 3, 11]},
    "head_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 2]}},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        "rank_pattern": {"experts.down_proj": 2},
    },
}
"""Arguments of peft's LoraConfig by kind; those that are not given are r=4, lora_alpha=8, task_type=CAUSAL_LM."""


def make_adapter(
    module: Any,
    folder: Path,
    kind: str | Mapping[str, Any],
    seed: int = 0,
    scale: float = 0.1,
    prepare: Callable[[Any], None] | None = None,
    save_embedding_layers: bool = False,
) -> tuple[Path, Any]:
    """(the folder, peft's model with the adapter on it, unmerged).

    module: a transformers model, not packed; it is copied. kind: of `KINDS`, or arguments of LoraConfig. scale: of the
    random changes. prepare: is given the copy first, as resizing its embeddings. save_embedding_layers: not "auto",
    for which peft asks the Hugging Face Hub.
    """
    from peft import LoraConfig, get_peft_model

    arguments = KINDS[kind] if isinstance(kind, str) else kind
    copied = copy.deepcopy(module)
    if prepare is not None:
        prepare(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | dict(arguments)))
        model = get_peft_model(copied, config, autocast_adapter_dtype=False).eval()
        _randomize(model, seed, scale)
        model.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    return folder, model


@torch.no_grad()
def _randomize(model: Any, seed: int, scale: float) -> None:
    """Every weight that would have been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + scale * noise)
            elif "lora_" in name:
                parameter.copy_(noise * scale)
            else:
                parameter.add_(noise * scale)
