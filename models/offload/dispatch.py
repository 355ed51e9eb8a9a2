"""Puts a placement into effect: what stays is copied to the device, what waits gets a stream.

Knows nothing of budgets.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from cadenza.models.install import install, slots
from cadenza.models.offload.blocks import Part, parts_of
from cadenza.models.offload.placement import CPU, Placement
from cadenza.models.offload.stream import LayerStream, RowStream, StreamedLayer
from cadenza.models.weights import FileWeights


def dispatch(module: Any, weights: FileWeights, device: torch.device, placement: Placement) -> None:
    """Give `module`, whose tensors may be on meta, what it computes with, in place.

    Until its layers are laid out (`models.packing`) all of them come from their files when they are called: a trial
    run needs no more memory than a step does later.
    """
    parts = parts_of(module)
    where = placement.device_map
    streams = []
    for part in parts.blocks:
        streams.append(_stream(part, part.module, weights, device, where[part.name]))
    if parts.head is not None:
        holder = StreamedLayer(parts.head.module)
        _replace(module, parts.head.name, holder)
        streams.append(_stream(parts.head, holder, weights, device, where[parts.head.name]))
    if parts.embedding is not None and where[parts.embedding.name] != str(device):
        RowStream(parts.embedding.name, parts.embedding.module, weights, device)
    away = [stream for stream in streams if not stream.is_resident]
    for stream, following in pairwise([*away, *away[:1]]):
        stream.following = following
    _install_rest(module, weights, device)
    module.hf_device_map = dict(where)


def _stream(
    part: Part, module: nn.Module, weights: FileWeights, device: torch.device, where: str
) -> LayerStream:
    is_resident = where == str(device)
    if where == CPU and not is_resident:
        weights = _held_in_memory(weights, [slot.name for slot in slots(part.module, part.name)])
    return LayerStream(part.name, module, weights, device, is_resident=is_resident)


def _held_in_memory(weights: FileWeights, names: Iterable[str]) -> FileWeights:
    """Copies in CPU memory, from where a GPU can fetch them without help."""
    held = {name: weights[name].clone() for name in names if name in weights}
    weights.release()
    if torch.cuda.is_available():
        held = {name: tensor.pin_memory() for name, tensor in held.items()}
    return FileWeights({}, held)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)


def _install_rest(module: nn.Module, weights: FileWeights, device: torch.device) -> None:
    """All that no stream brings, and buffers that are in no file, wherever they are."""
    hooked = [
        part
        for part in module.modules()
        if isinstance(getattr(part, "_hf_hook", None), LayerStream | RowStream)
    ]
    streamed = {id(child) for part in hooked for child in part.modules()}
    left = [slot for slot in slots(module) if id(slot.owner) not in streamed and slot.name in weights]
    install(left, weights, device)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)
