"""Mixtures of experts: every expert's matrices are quantized, and the model is the one with dequantized weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cadenza.models.architecture import read_config
from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.packing import pack
from cadenza.models.quantization.experts import ExpertStack
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.rotation import block_size

COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    num_experts_per_tok=2,
)
MODELS: list[tuple[Any, Any, dict[str, int]]] = [
    (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 4, "moe_intermediate_size": 32}),
    (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
]


def rounded(weight: Tensor, *, is_rotated: bool = True) -> Tensor:
    """A matrix as int8 with a scale per row keeps it, in float64, by its definition."""
    size = block_size(weight.shape[-1]) if is_rotated else 1
    matrix = torch.from_numpy(hadamard(size)).double()
    turned = (weight.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2) / size
    scale = turned.abs().amax(-1, keepdim=True).float().double() / 127
    return (((turned / scale).round() * scale).unflatten(-1, (-1, size)) @ matrix).flatten(-2)


@pytest.mark.parametrize(
    ("config_class", "model_class", "more"), MODELS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_quantized_mixture_is_the_model_with_its_weights_rounded(
    config_class: Any, model_class: Any, more: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    original = model_class(config_class(**COMMON | more)).eval()
    for parameter in original.parameters():  # larger than at the start of a training, so that experts differ
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    original.save_pretrained(tmp_path / "model")
    source = ModuleSource(
        "mixture",
        tmp_path / "model",
        open_checkpoint(tmp_path / "model", allow_pickle=False),
        model_class,
        read_config(tmp_path / "model", trust_remote_code=False),
        torch.float32,
        torch.device("cpu"),
        False,
    )
    quantized = load_module(source, Int8())
    assert any(isinstance(part, ExpertStack) for part in quantized.modules())

    keep = ("gate.weight", "layernorm", "norm.weight")
    for name, parameter in original.named_parameters():
        if parameter.ndim > 1 and not any(part in name for part in keep):
            parameter.data = rounded(parameter.data, is_rotated="embed" not in name).float()
    ids = torch.arange(40).remainder(320)[None]
    with torch.inference_mode():
        expected, slow = original(ids).logits, quantized(ids).logits
        torch.testing.assert_close(slow, expected, rtol=0, atol=float(1e-4 * expected.abs().max()))
        assert pack(quantized) > 0
        fast = quantized(ids).logits
    assert float((fast - expected).norm() / expected.norm()) < 0.1  # activations are rounded, too


def test_a_stack_answers_linear_and_nothing_else() -> None:
    layer = Int8().layer(8, 4, has_bias=False, dtype=torch.float32)
    weight = torch.arange(32.0).view(4, 8)
    for name, tensor in Int8().quantize(weight).items():
        setattr(layer, name, tensor)
    matrix: Any = ExpertStack([layer])[torch.tensor(0)]
    x, bias = torch.ones(3, 8), torch.ones(4)
    torch.testing.assert_close(torch.nn.functional.linear(x, matrix, bias), x @ rounded(weight).float().T + 1)
    with pytest.raises(TypeError, match="linear only"):
        torch.matmul(x, matrix)
    with pytest.raises(TypeError):
        x @ matrix
