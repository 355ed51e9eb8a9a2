"""Tiny random decoder-only models that are the same in every version of transformers.

Each weight is drawn from a generator of its own, seeded by its name, so the order in which a version builds its
layers does not matter. Read by `make_goldens.py` (transformers 4) and by the tests (transformers 5), hence plain.
"""

import zlib
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {},
    "Qwen2": {},
    "Gemma": {"head_dim": 32},
    "Olmo2": {},
    "Granite": {"attention_multiplier": 0.4, "residual_multiplier": 0.5, "logits_scaling": 0.5},
    "GPTNeoX": {"rotary_pct": 0.25},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "Phi": {"partial_rotary_factor": 0.5},
}
PROMPT_LENGTHS = (3, 20, 70)


def tiny_model(name: str, **extra: Any) -> Any:
    """A model of one of ARCHITECTURES or another, with weights large enough for its logits to tell tokens apart."""
    config_class = getattr(transformers, f"{name}Config")
    known = {key: value for key, value in SIZES.items() if hasattr(config_class(), key)}
    config = config_class(**known, **ARCHITECTURES.get(name, {}), **extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            name_of_5 = key.replace("embed_out", "lm_head")  # GPT-NeoX has renamed its last layer
            generator = torch.Generator().manual_seed(zlib.crc32(name_of_5.encode()))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(0.15 * noise)
            else:  # biases and norms: about where they start, so not all 0 or 1
                weight.copy_((0.0 if key.endswith("bias") else 1.0) + 0.1 * noise)
    return model.requires_grad_(False)


def tiny_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def fingerprint(model: Any, prompt: list[int]) -> list[float]:
    """Eight logits of a prompt: two versions that agree on these have the same model."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return [round(value, 4) for value in logits[:: len(logits) // 8][:8].tolist()]
