"""Puts layers that no batch can influence in place of a model's own, on a CPU in float32.

Linear layers become packed ones (`linear`); those that are given the same tensor, such as the query, key and value
projections, become one product. Activations become `RowwiseActivation`s (`activation`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cadenza.models.activation import ACTIVATIONS, RowwiseActivation
from cadenza.models.linear import PACKED_DTYPES, PackedGroup, PackedLinear

Siblings = Sequence[tuple[nn.Module, Sequence[str]]]
"""A module and the names of its linear layers that are given the same tensor."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the packed operators for weights on `device` in `dtype`."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available()


@contextmanager
def watch_siblings(module: nn.Module) -> Iterator[list[tuple[nn.Module, list[str]]]]:
    """Find, in the forward pass that runs inside the block, linear layers that are given the same tensor object.

    Only children of one module are grouped. The list is filled when the block ends.
    """
    siblings: list[tuple[nn.Module, list[str]]] = []
    inputs: dict[nn.Module, Tensor] = {}  # holding the tensors keeps their identities apart
    hooks = []
    for child in module.modules():
        if _is_linear(child):
            hooks.append(child.register_forward_pre_hook(lambda at, args: inputs.__setitem__(at, args[0])))
    try:
        yield siblings
    finally:
        for hook in hooks:
            hook.remove()
    for parent in module.modules():
        by_input: dict[int, list[str]] = {}
        for name, child in parent.named_children():
            if child in inputs:
                by_input.setdefault(id(inputs[child]), []).append(name)
        siblings += [(parent, names) for names in by_input.values() if len(names) > 1]


def pack(module: nn.Module, siblings: Siblings = ()) -> int:
    """Replace, in place, every linear layer and activation below `module`; returns how many linear layers.

    Covers `nn.Linear` and GPT-2's `Conv1D` (a linear layer with its weight transposed). Row-major weights are
    released as they are packed unless something else, such as a tied embedding, holds them.
    """
    count = 0
    for parent, names in siblings:
        group = PackedGroup([_weight_and_bias(getattr(parent, name)) for name in names])
        if not group.is_row_invariant:  # some shapes, with the oneDNN of torch 2.11: one by one, below
            continue
        for name, member in zip(names, group.members(), strict=True):
            setattr(parent, name, member)
            count += 1
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if _is_linear(child):
                setattr(parent, name, PackedLinear(*_weight_and_bias(child)))
                count += 1
            elif isinstance(child, ACTIVATIONS):
                setattr(parent, name, RowwiseActivation(child))
    return count


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[out_features, in_features], [out_features] or None."""
    assert isinstance(layer, nn.Linear | Conv1D)
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    return weight.T if isinstance(layer, Conv1D) else weight, bias
