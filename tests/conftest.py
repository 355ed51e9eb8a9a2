"""The real model that tests share: loaded once a session, converted once a cache."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cadenza.models import LoadConfig, LoadedModel, load_model

torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2", LoadConfig(dtype="float32", device="cpu"))


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
