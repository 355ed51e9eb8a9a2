"""The real model that tests share: loaded once a session, converted once a cache."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.models import LoadConfig, LoadedModel, load_model

torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2", LoadConfig(dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def new_tiny_model(smollm2: LoadedModel) -> Callable[..., LoadedModel]:
    """new_tiny_model(seed, settings of its configuration): a random model of milliseconds per step that reads and
    writes the real vocabulary, whose layers no engine has replaced yet."""

    def make(seed: int = 3, *, num_hidden_layers: int = 2, attention_bias: bool = False) -> LoadedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=smollm2.config.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_hidden_layers,
            attention_bias=attention_bias,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            eos_token_id=smollm2.eos_token_ids[0],
        )
        module = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return dataclasses.replace(smollm2, name="tiny", module=module, config=config, max_model_len=256)

    return make


@pytest.fixture(scope="session")
def smollm2_path(smollm2: LoadedModel) -> Path:
    return smollm2.path


@pytest.fixture(scope="session")
def adapter_makers() -> ModuleType:
    """tests/adapter_makers.py: `make_adapter`, which has peft make an adapter of any of its `KINDS`."""
    spec = importlib.util.spec_from_file_location(
        "adapter_makers", Path(__file__).with_name("adapter_makers.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_adapter(adapter_makers: ModuleType) -> Callable[..., tuple[Path, Any]]:
    """(folder, peft's model) = make_adapter(module, folder, kind, seed)."""
    made: Callable[..., tuple[Path, Any]] = adapter_makers.make_adapter
    return made
