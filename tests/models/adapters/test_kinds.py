"""Every kind of adapter that peft makes, read and put into the weights, against peft's own unmerged model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

IDS = torch.tensor([[3, 7, 11, 5, 2, 40, 7, 1, 30, 12]])
LLAMA_KINDS = (
    *("lora", "rslora", "patterns", "dora", "lora_bias", "saved", "saved_mlp", "saved_embeddings"),
    *("embedding", "dora_embedding", "head", "tokens", "head_tokens", "parameters"),
)
CASES = [
    *(("llama", kind) for kind in LLAMA_KINDS),
    *(("tied", kind) for kind in (*LLAMA_KINDS, "tied_embeddings", "tied_lora")),
    *(("qwen2", kind) for kind in ("lora", "dora", "lora_bias", "bias_lora_only", "bias_all", "saved")),
    *(("gpt2", kind) for kind in ("lora", "dora", "lora_bias", "bias_lora_only", "bias_all")),
    *(("gemma2", kind) for kind in ("lora", "embedding", "dora_embedding", "tokens", "tied_embeddings")),
    *(("gemma3", kind) for kind in ("lora", "embedding", "dora_embedding", "tokens", "saved_embeddings")),
    *((model, kind) for model in ("mixtral", "qwen3_moe", "gpt_oss") for kind in ("lora", "experts")),
]
GPT2_KINDS = {
    "saved": {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "c_proj", "wte", "lm_head"]},
    "parameters": {"target_modules": [], "target_parameters": ["c_attn.weight", "wte.weight"]},
}
CASES += [("gpt2", kind) for kind in GPT2_KINDS]
TIED_KINDS = {
    "same tokens": {"trainable_token_indices": {"embed_tokens": [4, 2], "lm_head": [4, 2]}},
    "other tokens": {"trainable_token_indices": {"embed_tokens": [4, 2], "lm_head": [7]}},
    "tied tokens": {"trainable_token_indices": {"embed_tokens": [4, 2]}, "ensure_weight_tying": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj", "exclude_modules": ".*v_proj"},
}
CASES += [("tied", kind) for kind in TIED_KINDS]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: str(value))
def test_equals_peft(
    name: str,
    kind: str,
    tiny: Callable[..., Any],
    make_adapter: Callable[..., Any],
    read: Callable[..., Any],
    apply: Callable[..., Any],
    tmp_path: Path,
) -> None:
    module = tiny(name)
    arguments: Any = GPT2_KINDS[kind] if name == "gpt2" and kind in GPT2_KINDS else kind
    if kind in TIED_KINDS:
        arguments = {"target_modules": ["q_proj"]} | TIED_KINDS[kind]
    folder, model = make_adapter(module, tmp_path, arguments)
    adapter = read(folder, module)
    expected, base = model(input_ids=IDS).logits, module(input_ids=IDS).logits
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(apply(module, adapter)(input_ids=IDS).logits, expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [[7, 3], {"language_model.embed_tokens": [7, 3]}])
def test_tokens_of_a_wrapped_text_model(
    tokens: Any,
    tiny: Callable[..., Any],
    make_adapter: Callable[..., Any],
    read: Callable[..., Any],
    apply: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """An adapter of a model that has the text model a level deeper."""
    module = tiny("tied")
    folder, model = make_adapter(
        module, tmp_path, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}
    )
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    old, new = "base_model.model.model.", "base_model.model.model.language_model."
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": tokens}))
    actual = apply(module, read(folder, module))(input_ids=IDS).logits
    torch.testing.assert_close(actual, model(input_ids=IDS).logits, atol=1e-9, rtol=1e-9)
