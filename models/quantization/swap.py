"""Puts empty quantized layers in place of a model's own.

Every linear layer, a mixture's experts and the token embedding, but for what decides by small differences (a mixture's
router) and what the method cannot store; those keep their precision. Knows nothing of files or devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cadenza.models.quantization.base import Method
from cadenza.models.quantization.embedding import QuantizedEmbedding
from cadenza.models.quantization.experts import put_stack, stackable_parameters

ROUTERS = ("router", "gate", "shared_expert_gate")
"""Last names of layers that choose a mixture's experts."""


@dataclass(frozen=True)
class Replaced:
    """One layer that has been replaced: its weight still lies in the checkpoint under `weight_name`."""

    weight_name: str
    method: Method | None
    """None: an embedding."""
    is_transposed: bool = False
    expert: int | None = None
    """The weight is this one of a stack."""

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """weight: as in the checkpoint, in any floating-point type. The new layer's buffers by name."""
        weight = weight if self.expert is None else weight[self.expert]
        weight = weight.T.contiguous() if self.is_transposed else weight
        return QuantizedEmbedding.quantize(weight) if self.method is None else self.method.quantize(weight)


def quantize_modules(module: Any, method: Method, dtype: torch.dtype) -> dict[str, Replaced]:
    """Replace layers of a transformers model in place, whatever device they are on; what was replaced, by name."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    replaced: dict[str, Replaced] = {}
    for name, child in list(module.named_modules()):
        new: nn.Module
        if child is embedding and type(child) is nn.Embedding:
            new = QuantizedEmbedding(child.num_embeddings, child.embedding_dim, dtype)
            replaced[name] = Replaced(f"{name}.weight", None)
        elif type(child) is nn.Linear or isinstance(child, Conv1D):
            chosen = method.head if child is head else method
            in_features, out_features = _shape(child)
            if name.rpartition(".")[2] in ROUTERS or not chosen.can_quantize(out_features, in_features):
                continue
            new = chosen.layer(in_features, out_features, has_bias=child.bias is not None, dtype=dtype)
            new.is_transposed = isinstance(child, Conv1D)
            replaced[name] = Replaced(f"{name}.weight", chosen, new.is_transposed)
        else:
            replaced |= _replace_experts(name, child, method, dtype)
            continue
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, new)
    return replaced


def _replace_experts(path: str, module: nn.Module, method: Method, dtype: torch.dtype) -> dict[str, Replaced]:
    replaced = {}
    for name, shape in stackable_parameters(module, method).items():
        put_stack(module, name, method, shape, dtype)
        for expert in range(shape[0]):
            layer = f"{path}.{name}.experts.{expert}"
            replaced[layer] = Replaced(f"{path}.{name}", method, expert=expert)
    return replaced


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)"""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features
