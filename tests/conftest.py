"""The real model that tests share: loaded once a session, converted once a cache."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
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


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def adapter_makers() -> ModuleType:
    """tests/adapter_makers.py: `make_adapter`, which has peft make an adapter of any of its `KINDS`."""
    return _beside("adapter_makers")


@pytest.fixture(scope="session")
def triton_interpreter() -> ModuleType:
    """tests/triton_interpreter.py: `with triton_interpreter.interpreted():` kernels run on tensors of a CPU."""
    pytest.importorskip("triton")
    return _beside("triton_interpreter")


@pytest.fixture(scope="session")
def triton_compiler() -> ModuleType:
    """tests/triton_compiler.py: `check_needs` compares what compiled kernels take with a table."""
    pytest.importorskip("triton")
    return _beside("triton_compiler")


@pytest.fixture(
    params=[
        "interpreter",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where Triton's kernels run in the test: in its interpreter on the CPU and, where there is one, on a GPU."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    interpreter = request.getfixturevalue("triton_interpreter")
    interpreter.skip_where_it_fails()
    with interpreter.interpreted():
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def make_adapter(adapter_makers: ModuleType) -> Callable[..., tuple[Path, Any]]:
    """(folder, peft's model) = make_adapter(module, folder, kind, seed)."""
    made: Callable[..., tuple[Path, Any]] = adapter_makers.make_adapter
    return made
