"""What an engine would make of a model that nobody has loaded: from its outline, the configuration, and free memory.

The decisions are those of the loader and the engine: the same functions are asked in the same order. Free memory is
what is free now less what the weights will take; what the process itself takes by then is not known. Knows nothing
of tables or JSON.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cadenza.decoding import probe
from cadenza.decoding.adapters.tables import slot_bytes
from cadenza.decoding.config import EngineConfig, demand
from cadenza.decoding.kv_cache import LayerShape
from cadenza.decoding.memory_plan import MemoryPlan, plan_memory
from cadenza.models import LoadConfig, ModelError
from cadenza.models.adapters.layout import layout_of
from cadenza.models.architecture import context_length
from cadenza.models.load import check, device_named, dtype_named
from cadenza.models.memory import Memory, available_bytes, memory_of, require_memory
from cadenza.models.offload.budget import limits
from cadenza.models.offload.placement import Placement, place
from cadenza.models.outline import Outline, outline
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.methods import method_named
from cadenza.models.quantization.names import GROUP_SIZES, Quantization
from cadenza.models.sizing import Parameters, Sizes, count_parameters, sized_module, weight_sizes

_PLAIN = ("float32", "bfloat16", "float16")
_QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "fp8", "llm-int8", "int4", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """What would become of the model at one precision."""

    dtype: str
    """Of activations, KV cache, and what is not quantized."""
    quantization: Quantization
    group_size: int | None
    sizes: Sizes | None = None
    """None where the method cannot run here."""
    placement: Placement | None = None
    """What waits elsewhere; None: nothing is limited, or too much is."""
    memory: MemoryPlan | None = None
    """None where the model does not fit."""
    adapter_bytes: int = 0
    """Of the slots for adapters, counted among what a step takes."""
    refusal: str | None = None
    """Why `serve` would refuse, in its own words."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def name(self) -> str:
        if self.quantization == "none":
            return self.dtype
        return self.quantization + (f", groups of {self.group_size}" if self.group_size else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    outline: Outline
    parameters: Parameters
    shapes: Sequence[LayerShape]
    """Of the KV cache, layer by layer."""
    device: torch.device
    max_model_len: int
    """That configuration and user allow."""
    machine: dict[str, Memory]
    """Every device and what it has free."""
    chosen: PrecisionPlan
    dtype_reason: str
    precisions: list[PrecisionPlan]
    draft: Outline | None = None

    @property
    def alternative(self) -> PrecisionPlan | None:
        """If what was chosen is refused: the least coarse precision that would not be."""
        fitting = [plan for plan in self.precisions if plan.refusal is None and plan.sizes is not None]
        if self.chosen.refusal is None or not fitting:
            return None
        return max(fitting, key=lambda plan: plan.sizes.total if plan.sizes else 0)


@dataclass(frozen=True, slots=True)
class _Model:
    """What `config.demand` asks of a model."""

    device: torch.device
    dtype: torch.dtype
    config: Any
    max_model_len: int
    kv_cache_bytes: int | None
    """What a memory budget leaves."""


def plan_model(
    source: str, load: LoadConfig = LoadConfig(), engine: EngineConfig = EngineConfig()
) -> ModelPlan:
    """Raises `ModelError` where the model could not be served with any amount of memory."""
    check(load)
    planner = _Planner(source, load, engine)
    chosen = planner.precision(planner.dtype, load.quantization, load.group_size)
    return ModelPlan(
        outline=planner.outline,
        parameters=planner.parameters,
        shapes=planner.shapes,
        device=planner.device,
        max_model_len=planner.max_model_len,
        machine=_machine(),
        chosen=chosen,
        dtype_reason=planner.dtype_reason,
        precisions=list(planner.precisions()),
        draft=planner.draft,
    )


class _Planner:
    """What all precisions have in common."""

    def __init__(self, source: str, load: LoadConfig, engine: EngineConfig) -> None:
        self._engine = engine
        self.outline = outline(
            source,
            revision=load.revision,
            trust_remote_code=load.trust_remote_code,
            allow_pickle=load.allow_pickle,
        )
        self.device = device_named(load.device)
        stored = self.outline.checkpoint.float_dtype
        self.dtype = dtype_named(load.dtype, self.device.type, stored)
        self.dtype_reason = _dtype_reason(load.dtype, self.device.type, stored)
        self.max_model_len = context_length(self.outline.text_config, load.max_model_len)
        needs = replace(engine.step_needs(self.device), context_length=self.max_model_len)
        self._limits = limits(
            load.max_memory, load.cpu_offload_gb, load.offload_folder, str(self.device), needs
        )
        module = _shapes_only(self.outline, torch.float32)
        self.parameters = count_parameters(module)
        self.shapes = probe.layer_shapes(module, self.outline.text_config, on_meta=True)
        self.draft = None if engine.draft_source is None else outline(engine.draft_source)
        self._draft_shapes: list[LayerShape] = []
        if self.draft is not None:
            module = _shapes_only(self.draft, torch.float32)
            self._draft_shapes = probe.layer_shapes(module, self.draft.text_config, on_meta=True)

    def precisions(self) -> Iterator[PrecisionPlan]:
        for dtype in _PLAIN:
            yield self.precision(dtype, "none", 0)
        for name in _QUANTIZATIONS:
            for group_size in GROUP_SIZES if name == "int4" else (0,):
                yield self.precision(self.dtype, name, group_size)

    def precision(self, dtype_name: str, quantization: Quantization, group_size: int) -> PrecisionPlan:
        dtype: torch.dtype = getattr(torch, dtype_name)
        plan = PrecisionPlan(
            dtype=dtype_name,
            quantization=quantization,
            group_size=group_size if quantization == "int4" else None,
        )
        try:
            method = method_named(quantization, group_size, self.device)
        except ModelError as error:
            return replace(plan, refusal=str(error))
        module = _shapes_only(self.outline, dtype, method)
        sizes = weight_sizes(module, self.device, dtype, is_quantized=method is not None)
        plan = replace(plan, sizes=sizes, adapter_bytes=self._adapter_bytes(dtype))
        try:
            plan = replace(plan, placement=self._placement(module, dtype))
            self._require(plan, is_float=method is None and self.outline.quantized_by is None)
            return replace(plan, memory=self._memory(plan))
        except ModelError as error:
            return replace(plan, refusal=str(error))

    def _placement(self, module: Any, dtype: torch.dtype) -> Placement | None:
        """As the loader does, of layers that may wait elsewhere."""
        if self._limits is None:
            return None
        return place(module, self.outline.text_config, self.device, dtype, self._limits, self.outline.name)

    def _require(self, plan: PrecisionPlan, *, is_float: bool) -> None:
        """As the loader does, before it reads weights."""
        assert plan.sizes is not None
        if plan.placement is not None:
            needed = plan.placement.resident_bytes
        elif is_float:
            needed = self.outline.checkpoint.loaded_bytes(plan.torch_dtype.itemsize)
        else:
            needed = plan.sizes.state
        require_memory(needed, self.device, self.outline.name)

    def _memory(self, plan: PrecisionPlan) -> MemoryPlan:
        """As the engine does, once the weights are there."""
        assert plan.sizes is not None
        free, allotted = available_bytes(self.device), None
        in_use = plan.sizes.in_use
        if plan.placement is not None:
            in_use, allotted = plan.placement.resident_bytes, plan.placement.kv_cache_bytes
        if self.draft is not None:
            module = _shapes_only(self.draft, plan.torch_dtype)
            in_use += weight_sizes(module, self.device, plan.torch_dtype, is_quantized=False).in_use
        config = self.outline.text_config
        model = _Model(self.device, plan.torch_dtype, config, self.max_model_len, allotted)
        wanted = demand(
            self._engine,
            model,
            [*self.shapes, *self._draft_shapes],
            probe.longest_independent_context(config),
            None if free is None else max(0, free - in_use),
            plan.adapter_bytes,
        )
        return plan_memory(wanted)

    def _adapter_bytes(self, dtype: torch.dtype) -> int:
        if not self._engine.enable_lora:
            return 0
        layout = layout_of(_shapes_only(self.outline, dtype))
        return slot_bytes(layout, self._engine.max_loras, self._engine.max_lora_rank, dtype)


def _shapes_only(model: Outline, dtype: torch.dtype, method: Method | None = None) -> Any:
    """A module of its own: what is done to it changes its configuration, too."""
    return sized_module(model.model_class, copy.deepcopy(model.config), dtype, method)


def _dtype_reason(asked: str, device_type: str, stored: str | None) -> str:
    if asked != "auto":
        return "--dtype"
    if device_type == "cpu":
        return "the default on a CPU"
    return "the checkpoint's own" if stored not in (None, "float32") else "the default on a GPU"


def _machine() -> dict[str, Memory]:
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    found = {name: memory_of(torch.device(name)) for name in names}
    return {name: memory for name, memory in found.items() if memory is not None}
