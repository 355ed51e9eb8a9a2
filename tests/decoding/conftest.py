"""One engine over the real model for every test of this folder, and the same weights as transformers runs them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig
from cadenza.models import LoadedModel


@pytest.fixture(scope="session")
def engine(smollm2: LoadedModel) -> Iterator[Engine]:
    with Engine(smollm2, EngineConfig(max_num_seqs=32, kv_cache_memory_gb=0.5)) as running:
        yield running


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> Any:
    """transformers' own model with its own attention. The engine takes over the other copy in place."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def tiny_model(smollm2: LoadedModel) -> LoadedModel:
    """A random model of milliseconds per step that reads and writes the real vocabulary. Engines may share it."""
    return _tiny_model(smollm2)


@pytest.fixture
def fresh_tiny_model(smollm2: LoadedModel) -> LoadedModel:
    """The same, whose layers no engine has replaced yet, and which can be copied therefore."""
    return _tiny_model(smollm2)


def _tiny_model(smollm2: LoadedModel) -> LoadedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=smollm2.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=smollm2.eos_token_ids[0],
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dataclasses.replace(smollm2, module=module, config=config, max_model_len=256)
