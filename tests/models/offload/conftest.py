"""Tiny models in folders, and loading them within a budget: resident, half of the layers away, all of them away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.offload.blocks import parts_of
from cadenza.models.offload.budget import Limits, StepNeeds
from cadenza.models.offload.placement import activation_bytes
from cadenza.models.packing import can_pack, pack, watch_siblings
from cadenza.models.quantization.methods import method_named
from cadenza.models.quantization.swap import quantize_modules
from cadenza.models.skeleton import hollow_module

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "untied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False, pad_token_id=300)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=320, n_embd=64, n_layer=5, n_head=4, n_positions=128)),
}
NOTHING_ELSE = StepNeeds(kv_cache_bytes=1, num_tokens=1, num_rows=1)
IDS = torch.arange(24)[None] * 7 % 320


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(5)
        found[name] = tmp_path_factory.mktemp(name)
        model_class(config).save_pretrained(found[name])
    return found


@pytest.fixture
def source_of(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ModuleSource]:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path_factory.getbasetemp() / "offload-cache"))

    def make(name: str, budget: int | None = None, dtype: torch.dtype = torch.float32) -> ModuleSource:
        model_class, _ = MODELS[name]
        folder = folders[name]
        limits = None if budget is None else Limits(budget, None, 0, None, NOTHING_ELSE)
        checkpoint = open_checkpoint(folder, allow_pickle=False)
        config = model_class.config_class.from_pretrained(folder)
        return ModuleSource(
            name, folder, checkpoint, model_class, config, dtype, CPU, trust_remote_code=False, limits=limits
        )

    return make


def loaded(source: ModuleSource, quantization: Any) -> Any:
    return load_module(source, method_named(quantization, 32, CPU))


def budgets(source: ModuleSource, quantization: Any) -> tuple[int, int]:
    """The least that the model is not refused for, all layers away; and one with which two of five layers stay."""
    module = hollow_module(source.model_class, source.config, source.dtype)
    if quantization != "none":
        quantize_modules(module, method_named(quantization, 32, CPU), source.dtype)
    parts = parts_of(module)
    assert parts.head is not None
    layer, head = parts.blocks[0].num_bytes, parts.head.num_bytes
    apart = {
        id(tensor) for part in parts.all for tensor in [*part.module.parameters(), *part.module.buffers()]
    }
    rest = sum(
        tensor.nbytes for tensor in [*module.parameters(), *module.buffers()] if id(tensor) not in apart
    )
    fixed = rest + activation_bytes(source.config, source.dtype, NOTHING_ELSE) + 1
    return fixed + max(2 * layer, head), fixed + head + 4 * layer


@torch.inference_mode()
def logits_before_and_after_packing(module: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """As the engine's start does it: a trial run that finds siblings, then layers are laid out."""
    with watch_siblings(module) as siblings:
        before = module(IDS).logits
    with torch.inference_mode(False):
        pack(module, siblings, packs_floats=can_pack(CPU, dtype))
    after = module(IDS).logits
    assert torch.equal(module(IDS).logits, after), "a second pass must find what the first one found"
    return before, after
