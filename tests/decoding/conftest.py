"""One engine over the real model for every test of this folder, and the same weights as transformers runs them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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
def tiny_model(new_tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    """A random model of milliseconds per step that reads and writes the real vocabulary. Engines may share it."""
    return new_tiny_model()


@pytest.fixture
def fresh_tiny_model(new_tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    """The same, whose layers no engine has replaced yet, and which can be copied therefore."""
    return new_tiny_model()
