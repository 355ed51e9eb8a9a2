"""Adapters where the model computes: puts them into slots, hooks into its modules, and rows into a step's batch.

On the engine's thread only. A module gets its hook when the first adapter comes that changes it; until then it costs
nothing. Layers that wait elsewhere (`models.offload`) get theirs anew whenever they come.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cadenza.decoding.adapters.batch import AdapterBatch, batch_of
from cadenza.decoding.adapters.embedding_site import EmbeddingHook
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.adapters.sites import LinearHook, ModuleHook, SiteHook
from cadenza.decoding.adapters.slots import AdapterSlots
from cadenza.decoding.adapters.tables import PlaneTables
from cadenza.decoding.adapters.weights import ModuleWeights
from cadenza.kernels.lora import num_planes
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.layout import Layout
from cadenza.models.offload.stream import streams_of
from cadenza.models.packing import can_pack


class AdapterRuntime:
    def __init__(
        self,
        module: Any,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_slots: int,
        max_rank: int,
        selects_logits: bool,
    ) -> None:
        """module: packed already; layout: taken down before. selects_logits: its output layer is given only rows whose
        logits are wanted."""
        self.layout = layout
        self.weights = ModuleWeights(module, layout, dtype, device)
        self.slots = AdapterSlots(num_slots, self._put, self._clear)
        self._module, self._dtype, self._device = module, dtype, device
        self._planes_per_slot = num_planes(max_rank)
        self._selects_logits = selects_logits
        self._hooks: dict[str, SiteHook] = {}
        self._batch: AdapterBatch | None = None
        for stream in streams_of(module):
            stream.when_there = self._attach_below

    def warm(self, adapter: Adapter) -> None:
        """Bring the adapter into a slot that nobody uses, if there is one, so that its first request finds it there."""
        adapters = AdapterSet.of(adapter)
        if self.slots.enter(adapters):
            self.slots.leave(adapters)

    @contextmanager
    def step(
        self, owners: Sequence[AdapterSet | None], kept: Sequence[int], token_ids: Tensor
    ) -> Iterator[None]:
        """Around a forward pass. owners: whose adapters each row is computed with; kept: the rows whose logits are
        wanted."""
        self._batch = batch_of(
            owners,
            kept if self._selects_logits else None,
            token_ids,
            self.slots.slot_of,
            self._planes_per_slot,
            self._device,
        )
        try:
            yield
        finally:
            self._batch = None

    def _current(self) -> AdapterBatch | None:
        return self._batch

    def _put(self, slot: int, adapter: Adapter) -> None:
        for name, change in adapter.changes.items():
            if name not in self._hooks:
                module = self._module.get_submodule(name)
                self._hooks[name] = self._make_hook(name)
                self._attach(name, module)
            self._hooks[name].put(slot, change)

    def _clear(self, slot: int) -> None:
        for hook in self._hooks.values():
            hook.clear(slot)

    def _make_hook(self, name: str) -> SiteHook:
        site = self.layout.sites[name]
        if site.kind == "embedding":
            is_input = name == self.layout.input_embedding
            return EmbeddingHook(site, self._current, self._dtype, self._device, is_input=is_input)
        if site.kind == "other":
            return ModuleHook(self._current, self._dtype, self._device)
        tables = partial(
            PlaneTables,
            self.slots.num_slots,
            self._planes_per_slot,
            site.in_features,
            site.out_features,
            self._dtype,
            self._device,
        )
        return LinearHook(
            site,
            self._current,
            tables,
            self.slots.num_slots,
            self._dtype,
            self._device,
            partial(self.weights.bias_here, name),
            is_output=name == self.layout.output_embedding,
            packs=can_pack(self._device, self._dtype),
        )

    def _attach(self, name: str, module: nn.Module) -> None:
        hook = self._hooks[name]
        if hook in module._forward_hooks.values():
            return
        module.register_forward_hook(hook)
        if isinstance(hook, EmbeddingHook):
            module.register_forward_pre_hook(hook.before)

    def _attach_below(self, prefix: str, module: nn.Module) -> None:
        """A layer has come whose modules may be new."""
        for name in self._hooks:
            if name.startswith(f"{prefix}."):
                self._attach(name, module.get_submodule(name[len(prefix) + 1 :]))
