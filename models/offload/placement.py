"""Where each layer waits: decided from sizes alone, before any tensor is read.

What a budget must hold, besides the weights that stay: the KV cache, the activations of a step, and the layer that
comes while others are away, twice, since it is laid out from one form into another. The token embedding stays in its
file on a CPU: rows are looked up there. Layers are given to devices by accelerate's device map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cadenza.models.errors import ModelError
from cadenza.models.memory import available_bytes
from cadenza.models.offload.blocks import Part, Parts, parts_of
from cadenza.models.offload.budget import Limits, StepNeeds, size_text

KV_CACHE_SHARE = 0.25
CPU, DISK = "cpu", "disk"
_UNLIMITED_SHARE = 0.9


@dataclass(frozen=True)
class Placement:
    """Bytes are of the weights as they wait, not as they are laid out."""

    device_map: Mapping[str, str]
    """Where each layer waits, by its name in the module: a device, cpu or disk."""
    limit_bytes: int | None
    """Of everything on the device."""
    resident_bytes: int
    cpu_bytes: int
    disk_bytes: int
    kv_cache_bytes: int | None
    """Set aside for the engine's cache; None: what is free later."""
    working_bytes: int
    """Set aside for a step: activations, and the layer that is being used."""


def place(
    module: Any, config: Any, device: torch.device, dtype: torch.dtype, limits: Limits, name: str
) -> Placement:
    """module: its tensors may be on meta, quantized layers in place. config: of its text part. name: the model's.

    Raises `ModelError` with the numbers where the budget is too small.
    """
    parts = parts_of(module)
    rest = _rest(module, parts)
    activations = activation_bytes(config, dtype, limits.needs)
    if limits.device_bytes is None:
        return _offloaded(parts, device, limits, rest, activations)
    budget = _Budget(parts, device, dtype, limits, rest, activations)
    return budget.placement(config, name)


def activation_bytes(config: Any, dtype: torch.dtype, needs: StepNeeds) -> int:
    """An estimate of what a step's tensors take at once: a layer's intermediate results, and the logits.

    Per token eight vectors of the hidden size and four of the feed-forward's, of each expert that it is given to; per
    row of logits the float32 scores and three copies that sampling makes.
    """
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    per_token = (8 * hidden + 4 * int(inner) * experts) * dtype.itemsize
    return (
        needs.num_tokens * per_token + 4 * min(needs.num_rows, needs.num_tokens) * int(config.vocab_size) * 4
    )


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """An estimate from the configuration; the engine asks the model itself later."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim * dtype.itemsize


class _Budget:
    """Shares out what the device may hold."""

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
        limits: Limits,
        rest: int,
        activations: int,
    ) -> None:
        assert limits.device_bytes is not None
        self._parts, self._device, self._dtype, self._limits = parts, device, dtype, limits
        self._total, self._rest, self._activations = limits.device_bytes, rest, activations
        self._layer = max(part.num_bytes for part in parts.blocks)
        self._layers = sum(part.num_bytes for part in parts.blocks)
        self._head = 0 if parts.head is None else parts.head.num_bytes
        self._embedding = 0 if parts.embedding is None else parts.embedding.num_bytes

    def placement(self, config: Any, name: str) -> Placement:
        kv_cache = self._kv_cache(config, name)
        room = self._total - self._rest - self._activations - kv_cache
        device_map: dict[str, str] = {}
        stays_head = self._head + min(2 * self._layer, self._layers) <= room
        if self._parts.head is not None:
            device_map[self._parts.head.name] = self._here if stays_head else self._elsewhere
        room -= self._head if stays_head else 0
        stays_all = self._layers + self._limits.cpu_offload_bytes <= room and stays_head
        working = 0 if stays_all else max(2 * self._layer, 0 if stays_head else self._head)
        room_for_layers = room if stays_all else room - working
        layers = _device_map(self._parts.blocks, self._device, room_for_layers, self._limits, self._layer)
        device_map |= layers
        if self._parts.embedding is not None:
            spare = room_for_layers - sum(
                part.num_bytes for part in self._parts.blocks if layers[part.name] == self._here
            )
            is_here = spare >= self._embedding and (stays_all or self._device.type != "cpu")
            device_map[self._parts.embedding.name] = self._here if is_here else self._elsewhere
        return _placement(
            self._parts,
            device_map,
            self._here,
            self._total,
            self._rest,
            kv_cache,
            working + self._activations,
        )

    @property
    def _here(self) -> str:
        return str(self._device)

    @property
    def _elsewhere(self) -> str:
        return DISK if self._device.type == "cpu" else CPU

    def _kv_cache(self, config: Any, name: str) -> int:
        """Raises `ModelError` where not even one layer at a time fits beside it."""
        needs, per_token = self._limits.needs, kv_bytes_per_token(config, self._dtype)
        given, least = needs.kv_cache_bytes, needs.least_kv_tokens * per_token
        kv_cache = least if given is None else given
        layer = max(2 * self._layer, self._head)
        fixed = self._rest + self._activations
        if fixed + layer + kv_cache > self._total:
            raise ModelError(
                f"{name} does not fit into a max_memory of {size_text(self._total)}: it needs at least"
                f" {size_text(fixed + layer + kv_cache)}, of which {size_text(layer)} for the largest layer,"
                f" {size_text(self._rest)} for weights that stay, {size_text(self._activations)} for a step of"
                f" {needs.num_tokens} tokens and {needs.num_rows} rows of logits, {size_text(kv_cache)} for the KV"
                " cache; --quantization makes layers smaller, --max-num-batched-tokens and --max-num-seqs a step"
            )
        if given is not None:
            return given
        most_useful = needs.num_seqs * (needs.context_length + 64) * per_token
        wanted = min(int(self._total * KV_CACHE_SHARE), most_useful)
        beside_head = self._total - fixed - self._head - 2 * self._layer
        if beside_head >= wanted // 2:  # an output layer that stays is worth a part of the cache
            wanted = min(wanted, beside_head)
        return max(least, min(wanted, self._total - fixed - layer))


def _offloaded(parts: Parts, device: torch.device, limits: Limits, rest: int, activations: int) -> Placement:
    """So many layers as were asked for wait in CPU memory; the device is to hold everything else."""
    layer = max(part.num_bytes for part in parts.blocks)
    layers = sum(part.num_bytes for part in parts.blocks)
    kept = max(0, layers - limits.cpu_offload_bytes)
    device_map = _device_map(parts.blocks, device, kept, limits, layer)
    device_map |= {part.name: str(device) for part in (parts.head, parts.embedding) if part is not None}
    return _placement(parts, device_map, str(device), None, rest, None, 2 * layer + activations)


def _device_map(
    blocks: list[Part], device: torch.device, room: int, limits: Limits, layer: int
) -> dict[str, str]:
    """accelerate's, over the layers alone. It sets a layer aside on each device by itself, which `room` excludes."""
    from accelerate import infer_auto_device_map

    room = max(0, room) + layer
    if device.type == "cpu":
        max_memory: dict[int | str, int] = {CPU: room}
    else:
        cpu_bytes = limits.cpu_bytes
        if cpu_bytes is None:
            free = available_bytes(torch.device("cpu"))
            cpu_bytes = 2**62 if free is None else int(free * _UNLIMITED_SHARE)
        max_memory = {device.index or 0: room, CPU: cpu_bytes + layer}
    classes = sorted({type(part.module).__name__ for part in blocks})
    found = infer_auto_device_map(
        nn.ModuleList([part.module for part in blocks]),
        max_memory=max_memory,
        no_split_module_classes=classes,
        clean_result=False,
    )
    names = {DISK: DISK, CPU: CPU, device.index or 0: str(device)}
    return {part.name: names[found[str(number)]] for number, part in enumerate(blocks)}


def _placement(
    parts: Parts,
    device_map: dict[str, str],
    here: str,
    limit: int | None,
    rest: int,
    kv_cache: int | None,
    working: int,
) -> Placement:
    def at(place: str) -> int:
        return sum(part.num_bytes for part in parts.all if device_map[part.name] == place)

    return Placement(
        device_map=device_map,
        limit_bytes=limit,
        resident_bytes=rest + at(here),
        cpu_bytes=0 if here == CPU else at(CPU),
        disk_bytes=at(DISK),
        kv_cache_bytes=kv_cache,
        working_bytes=working,
    )


def _rest(module: nn.Module, parts: Parts) -> int:
    """Of what belongs to none of the parts."""
    inside = {id(child) for part in parts.all for child in part.module.modules()}
    tensors = {
        id(tensor): tensor
        for child in module.modules()
        if id(child) not in inside
        for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False))
    }
    return sum(tensor.nbytes for tensor in tensors.values())
