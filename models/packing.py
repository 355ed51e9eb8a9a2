"""Puts layers that no batch can influence in place of a model's own.

On a CPU, in precisions that it has products for, linear layers become packed ones (`linear`), and activations
`RowwiseActivation`s (`activation`); quantized layers are laid out for the device they are on. Layers that are given
the same tensor, such as the query, key and value projections, become one product.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cadenza.models.activation import ACTIVATIONS, RowwiseActivation
from cadenza.models.linear import PACKED_DTYPES, PackedGroup, PackedLinear
from cadenza.models.offload.stream import streams_of
from cadenza.models.quantization.base import QuantizedLinear

Siblings = Sequence[tuple[nn.Module, Sequence[str]]]
"""A module and the names of its linear layers that are given the same tensor."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the packed operators for weights on `device` in `dtype`."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available()


@contextmanager
def watch_elsewhere(module: nn.Module, num_tokens: int) -> Iterator[set[str]]:
    """Find, in the forward pass over so many tokens that runs inside the block, modules with weights of their own that
    are not given all of them, once, one after the other: such as the experts of a mixture, or norms of heads that are
    not given token by token. The set, of their names, is filled when the block ends."""
    elsewhere: set[str] = set()
    parts = {name: part for name, part in module.named_modules() if _is_linear(part) or _has_parameters(part)}
    given: dict[nn.Module, list[int]] = {part: [] for part in parts.values()}
    hooks = [
        part.register_forward_pre_hook(lambda at, args: given[at].append(_num_given(at, args)))
        for part in given
    ]
    try:
        yield elsewhere
    finally:
        for hook in hooks:
            hook.remove()
    elsewhere |= {name for name, part in parts.items() if given[part] != [num_tokens]}


def _num_given(part: nn.Module, args: tuple[Any, ...]) -> int:
    """How many tokens the module is given; 0 where it is given nothing that says so."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.ndim:
        return 0
    if isinstance(part, nn.Embedding):
        return x.numel()
    if _is_linear(part):
        return x.numel() // x.shape[-1]
    return x.shape[1] if x.ndim > 2 and x.shape[0] == 1 else x.shape[0]


def _has_parameters(part: nn.Module) -> bool:
    return any(True for _ in part.parameters(recurse=False))


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


def pack(
    module: nn.Module, siblings: Siblings = (), *, packs_floats: bool = True, on_cpu: bool = True
) -> int:
    """Replace, in place, every linear layer and activation below `module`; returns how many linear layers.

    Covers `nn.Linear`, GPT-2's `Conv1D` (a linear layer with its weight transposed) and quantized layers, which are
    laid out for their device. Row-major weights are released as they are packed unless something else, such as a
    tied embedding, holds them. Layers that wait elsewhere (`models.offload`) are packed each time they come, and not
    counted. packs_floats: whether `can_pack` says that layers in full precision can be packed; on_cpu: whether
    activations would let rows influence each other.
    """
    streams = streams_of(module)
    waiting = {part for stream in streams for part in stream.module.modules()}
    # the largest ones first, since they need most memory while they are packed
    for stream in sorted(streams, key=lambda stream: stream.num_bytes, reverse=True):
        own = set(stream.module.modules())
        within = [(parent, names) for parent, names in siblings if parent in own]
        stream.lay_out_with(partial(_pack, siblings=within, packs_floats=packs_floats, on_cpu=on_cpu))
    rest = [(parent, names) for parent, names in siblings if parent not in waiting]
    return _pack(
        module, rest, packs_floats=packs_floats, on_cpu=on_cpu, skip={stream.module for stream in streams}
    )


def _pack(
    module: nn.Module,
    siblings: Siblings,
    *,
    packs_floats: bool,
    on_cpu: bool,
    skip: Collection[nn.Module] = frozenset(),
) -> int:
    count = 0
    for parent, names in siblings:
        whole = _joined([getattr(parent, name) for name in names], packs_floats)
        if whole is None:  # one by one, below
            continue
        group = PackedGroup(
            whole, whole.in_features, [_out_features(getattr(parent, name)) for name in names]
        )
        for name, member in zip(names, group.members(), strict=True):
            setattr(parent, name, member)
            count += 1
    for parent in list(_modules_outside(module, skip)):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear) and not child.is_prepared:
                child.prepare()
                count += 1
            elif packs_floats and _is_float_linear(child):
                setattr(parent, name, PackedLinear(*_weight_and_bias(child)))
                count += 1
            elif on_cpu and isinstance(child, ACTIVATIONS):
                setattr(parent, name, RowwiseActivation(child))
    return count


def _modules_outside(module: nn.Module, skip: Collection[nn.Module]) -> Iterator[nn.Module]:
    """`module` and all below it, but for what is in `skip` and below."""
    if module not in skip:
        yield module
        for child in module.children():
            yield from _modules_outside(child, skip)


def _joined(layers: Sequence[nn.Module], packs_floats: bool) -> PackedLinear | QuantizedLinear | None:
    """One layer, ready to compute, in place of several that are given the same tensor; None if none can be made."""
    quantized_layers = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if len(quantized_layers) == len(layers) and len({type(layer) for layer in layers}) == 1:
        quantized = quantized_layers[0].concatenate(quantized_layers)
        if quantized is not None:
            quantized.prepare()
        return quantized
    if not packs_floats or not all(_is_float_linear(layer) for layer in layers):
        return None
    parts = [_weight_and_bias(layer) for layer in layers]
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
    has_bias = any(bias is not None for _, bias in parts)
    packed = PackedLinear(torch.cat([weight for weight, _ in parts]), torch.cat(biases) if has_bias else None)
    return packed if packed.is_row_invariant else None  # some shapes are not, with the oneDNN of torch 2.11


def _out_features(layer: nn.Module) -> int:
    return layer.nf if isinstance(layer, Conv1D) else int(layer.out_features)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return _is_float_linear(module) or isinstance(module, QuantizedLinear)


def _is_float_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[out_features, in_features], [out_features] or None."""
    assert isinstance(layer, nn.Linear | Conv1D)
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    return weight.T if isinstance(layer, Conv1D) else weight, bias
