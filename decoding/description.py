"""What an engine is, for a person who starts it and for dashboards: precision, memory, operators.

Each fact comes from the one place that decides it. Knows nothing of how it is shown.
"""

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cadenza.decoding.config import EngineConfig
from cadenza.decoding.memory_plan import MemoryPlan
from cadenza.kernels import ops
from cadenza.models import LoadedModel
from cadenza.models.linear import PackedLinear, computing_layers
from cadenza.models.quantization.base import QuantizedLinear

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """Sizes in bytes."""

    model: str
    device: str
    hardware: str
    """The device's name, and what of it is used."""
    dtype: str
    quantization: str
    num_parameters: int
    weight_bytes: int
    """On the device."""
    full_precision_bytes: Mapping[str, int]
    """What a quantization left as it was, by the reason."""
    offloaded_bytes: int
    """Of weights that wait elsewhere."""
    offload: str | None
    """Where they wait."""
    memory: MemoryPlan
    """The KV cache and what it has room for."""
    enable_prefix_caching: bool
    linear: Mapping[str, int]
    """What multiplies, and in how many layers."""
    attention: str
    sampling: str
    drafts: str | None
    """Who drafts tokens."""
    timings: Mapping[str, float]
    """Seconds by stage of the loading."""

    def __str__(self) -> str:
        """One line for a log."""
        memory, where = (
            self.memory,
            f"; {self.offloaded_bytes} bytes {self.offload}" if self.offload else "",
        )
        precision = self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"
        return (
            f"{self.model}, {precision} on {self.device} ({self.hardware}); weights {self.weight_bytes} bytes{where};"
            f" KV cache {memory.num_tokens} tokens, {memory.num_bytes} bytes; at once"
            f" {memory.full_length_concurrency} sequences of {memory.max_model_len} tokens; {self.kernels}"
        )

    @property
    def cache_config(self) -> dict[str, str]:
        """The KV cache by vLLM's names for dashboards, which compute tokens from num_gpu_blocks on any device."""
        return {
            "block_size": str(self.memory.demand.block_size),
            "cache_dtype": self.dtype,
            "enable_prefix_caching": str(self.enable_prefix_caching),
            "num_gpu_blocks": str(self.memory.num_blocks),
            "kv_cache_memory_bytes": str(self.memory.num_bytes),
        }

    @property
    def kernels(self) -> str:
        """The operators in one line."""
        linear = (
            ", ".join(f"{operator} ({number})" for operator, number in self.linear.items()) or "as they come"
        )
        return f"linear layers: {linear}; attention: {self.attention}; sampling: {self.sampling}"


def describe(
    model: LoadedModel,
    config: EngineConfig,
    memory: MemoryPlan,
    full_precision_bytes: Mapping[str, int],
) -> EngineDescription:
    """model: after its layers have been replaced."""
    placement: Any = getattr(model, "placement", None)
    away = (
        {} if placement is None else {"in CPU memory": placement.cpu_bytes, "on disk": placement.disk_bytes}
    )
    by_kernels = ops.runs_triton(model.device)
    return EngineDescription(
        model=model.name,
        device=str(model.device),
        hardware=_hardware(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization,
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        full_precision_bytes=full_precision_bytes,
        offloaded_bytes=sum(away.values()),
        offload=" and ".join(place for place, size in away.items() if size) or None,
        memory=memory,
        enable_prefix_caching=config.enable_prefix_caching,
        linear=linear_operators(model.module),
        attention="paged, Triton" if by_kernels else _attention(model.module, model.config),
        sampling="Triton, float32" if by_kernels else "torch, float32",
        drafts=config.speculative,
        timings=dict(model.timings),
    )


def linear_operators(module: nn.Module) -> dict[str, int]:
    """What multiplies in how many linear layers, most frequent first. Layers that wait elsewhere are not counted."""
    operators = (_operator(layer) for layer in computing_layers(module))
    return dict(Counter(operator for operator in operators if operator is not None).most_common())


def _operator(layer: nn.Module) -> str | None:
    if isinstance(layer, QuantizedLinear):
        return layer.operator if layer.is_prepared else None
    if isinstance(layer, PackedLinear):
        return f"oneDNN {str(layer.weight.dtype).removeprefix('torch.')}, packed"
    if isinstance(layer, nn.Linear | Conv1D) and not layer.weight.is_meta:
        return f"torch {str(layer.weight.dtype).removeprefix('torch.')}"
    return None


def _attention(module: nn.Module, config: Any) -> str:
    has_sinks = any("sinks" in part._parameters for part in module.modules())
    if getattr(config, "attn_logit_softcapping", None) is not None or has_sinks:
        return "paged, plain matrix products"
    return "paged, scaled_dot_product_attention"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{_processor()}, {capability}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
