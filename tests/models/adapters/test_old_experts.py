"""Adapters of mixtures in the form of transformers 4, against what peft makes of the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cadenza.models.errors import ModelError

IDS = torch.tensor([[3, 7, 11, 5, 2, 40, 7, 1, 30, 12]])
FORMS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 24),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 12),
}


def write(
    folder: Path, name: str, rank: int = 4, *, gate: bool = True, **config: Any
) -> dict[str, torch.Tensor]:
    block, layers, width = FORMS[name]
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, in_features: int, out_features: int) -> None:
        stem = f"base_model.model.model.layers.{module}.lora_"
        for letter, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            tensors[f"{stem}{letter}.weight"] = 0.2 * torch.randn(
                shape, generator=generator, dtype=torch.float64
            )

    for layer in range(2):
        add(f"{layer}.self_attn.q_proj", 16, 16)
        if gate:
            add(f"{layer}.{block}.gate", 16, 3)
        for expert in range(3):
            for linear in layers:
                shape = (width, 16) if linear == layers[2] else (16, width)
                add(f"{layer}.{block}.experts.{expert}.{linear}", *shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", *layers, *(["gate"] if gate else [])]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 12,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_equals_peft(
    name: str, tiny: Callable[..., Any], read: Callable[..., Any], apply: Callable[..., Any], tmp_path: Path
) -> None:
    import copy

    from peft import PeftModel

    module = tiny(name)
    write(tmp_path, name)
    adapter = read(tmp_path, module)
    model = PeftModel.from_pretrained(
        copy.deepcopy(module), str(tmp_path), autocast_adapter_dtype=False
    ).eval()
    expected = model(input_ids=IDS).logits
    assert (expected - module(input_ids=IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(apply(module, adapter)(input_ids=IDS).logits, expected, atol=1e-9, rtol=1e-9)


def test_each_expert_is_scaled_by_its_own_patterns(
    tiny: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    tensors = write(tmp_path, "mixtral", alpha_pattern={"experts.1.w3": 40}, gate=False)
    pair = read(tmp_path, tiny("mixtral")).changes["model.layers.0.mlp.experts"].low_rank["gate_up_proj"]
    product = pair.b @ pair.a
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.1."
    for linear, rows, alpha in (("w1", slice(0, 24), 12), ("w3", slice(24, 48), 40)):
        expected = (
            tensors[f"{stem}{linear}.lora_B.weight"] @ tensors[f"{stem}{linear}.lora_A.weight"] * alpha / 4
        )
        torch.testing.assert_close(product[1, rows], expected)


def test_what_peft_would_scale_otherwise_is_refused(
    tiny: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    write(tmp_path, "mixtral", use_rslora=True)
    with pytest.raises(
        ModelError, match="use_rslora is not supported for experts as transformers 4 had them"
    ):
        read(tmp_path, tiny("mixtral"))
