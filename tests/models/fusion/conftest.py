"""Tiny random models of many architectures, and a count of what is launched."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granite": {"residual_multiplier": 0.5},
}


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Any]:
    """new_model(architecture, settings): a random causal language model in float32 on the CPU."""

    def make(architecture: str, **settings: Any) -> Any:
        torch.manual_seed(3)
        config = AutoConfig.for_model(architecture, **{**SIZES, **OTHERS.get(architecture, {}), **settings})
        module = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """logits_of(module, ids): of transformers' own pass over some tokens."""

    @torch.inference_mode()
    def logits(module: nn.Module, ids: tuple[int, ...] = (1, 5, 9, 2, 7), **settings: Any) -> Tensor:
        tokens = torch.tensor([ids], device=next(module.parameters()).device)
        result: Tensor = module(input_ids=tokens, use_cache=False, **settings).logits[0]
        return result

    return logits


@pytest.fixture
def called(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called, by its launcher's name."""
    from cadenza.kernels import gated_activation, rms_norm, rotary

    counter: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        launcher = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return launcher(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (rms_norm, "rms_norm"),
        (rms_norm, "add_rms_norm"),
        (rotary, "rotary"),
        (gated_activation, "gated_activation"),
    ):
        count(module, name)
    return counter
