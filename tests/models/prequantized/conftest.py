"""A small random Llama, and checkpoints of it in other people's formats."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.models.architecture import read_config
from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.prequantized.detect import taken_format
from cadenza.models.quantization.methods import method_named

HIDDEN, INNER, VOCAB = 128, 192, 96
TOKENS = [[3, 1, 4, 1, 5, 92, 65, 35]]

Stored = dict[str, Tensor]
Encode = Callable[[str, Tensor], tuple[Stored, Tensor]]
"""From a layer's name, with a dot, and its weight: the tensors of the format, and the float64 weight they stand for."""


class Maker:
    """Writes checkpoints and knows what a model with their weights in float32 answers."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model_class: Any = LlamaForCausalLM
        self.config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        self.model = LlamaForCausalLM(self.config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # so that every layer matters to the logits

    def write(self, encode: Encode, described: Mapping[str, Any]) -> Tensor:
        """All linear layers but the head in the format; the logits of a model with the weights they stand for."""
        tensors: Stored = {}
        truth = dict(self.model.state_dict())
        for name, tensor in truth.items():
            if name.endswith("_proj.weight"):
                parts, weight = encode(name.removesuffix("weight"), tensor.detach())
                tensors |= parts
                truth[name] = weight.float()
            else:
                tensors[name] = tensor.detach()
        self.write_tensors(tensors, described)
        model = LlamaForCausalLM(self.config).eval()
        model.load_state_dict(truth)
        with torch.inference_mode():
            return model(torch.tensor(TOKENS)).logits

    def write_tensors(self, tensors: Stored, described: Mapping[str, Any]) -> None:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
            self.folder / "model.safetensors",
        )
        configuration = self.config.to_dict() | {
            "architectures": [self.model_class.__name__],
            "quantization_config": dict(described),
        }
        (self.folder / "config.json").write_text(json.dumps(configuration))

    def load(self, quantization: Any = "none") -> Any:
        config = read_config(self.folder, trust_remote_code=False)
        found = taken_format(config)
        device = torch.device("cpu")
        return load_module(
            ModuleSource(
                "tiny",
                self.folder,
                open_checkpoint(self.folder, allow_pickle=False),
                self.model_class,
                config,
                torch.float32,
                device,
                False,
                stored_format=found,
            ),
            method_named(quantization, 32, device),
        )

    def logits(self, quantization: Any = "none") -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.load(quantization)(torch.tensor(TOKENS)).logits
        return logits


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    return Maker(tmp_path / "model")
