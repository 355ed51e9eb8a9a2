"""What a model's weights take at a precision, counted on a module of shapes and types alone, without a byte of them.

Knows nothing of files, devices' memory or KV caches.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cadenza.models.packing import can_pack
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.embedding import QuantizedEmbedding
from cadenza.models.quantization.swap import ROUTERS, quantize_modules
from cadenza.models.skeleton import empty_module, keep_in_float32

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_NUM_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of elements, however they are stored."""

    total: int
    embedding: int
    """Of the token embedding."""
    layers: tuple[int, ...]
    """Of each decoder layer."""
    active: int
    """That a token is multiplied with: of a mixture's experts only those that it is sent to."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model's weights at one precision."""

    total: int
    """Parameters and buffers, tied ones once: what `LoadedModel.weight_bytes` will be."""
    state: int
    """The same of what a quantized file holds: each name counts, computed tables do not."""
    in_use: int
    """What they take once they are laid out for the device's operators."""
    kept: Mapping[str, int]
    """Of what a quantization leaves in full precision, by the reason; empty without one."""


def count_parameters(module: Any) -> Parameters:
    """module: a transformers causal LM; its tensors may be on meta."""
    config = module.config.get_text_config(decoder=True)
    layers = _longest_list(module, config.num_hidden_layers)
    total = _elements(module)
    routed = sum(_elements(part) for name, part in module.named_modules() if name.endswith(".experts"))
    num_experts, num_active = (_first(config, names) for names in (_NUM_EXPERTS, _NUM_ACTIVE_EXPERTS))
    idle = routed * (num_experts - num_active) // num_experts if num_experts and num_active else 0
    return Parameters(
        total=total,
        embedding=_elements(module.get_input_embeddings()),
        layers=tuple(_elements(layer) for layer in layers),
        active=total - idle,
    )


def sized_module(model_class: Any, config: Any, dtype: torch.dtype, method: Method | None) -> Any:
    """The module as it would be loaded, all tensors on meta."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = empty_module(model_class, config)
    finally:
        torch.set_default_dtype(default)
    keep_in_float32(module, dtype)
    if method is not None:
        quantize_modules(module, method, dtype)
    return module


def weight_sizes(module: Any, device: torch.device, dtype: torch.dtype, *, is_quantized: bool) -> Sizes:
    """module: as `sized_module` makes it, or as it was loaded, not laid out yet. dtype: of what is not quantized."""
    total = num_bytes(module)
    state = sum(tensor.nbytes for tensor in module.state_dict().values())
    packed_twice = 0
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if isinstance(head, nn.Linear) and can_pack(device, dtype):
        # the row-major weight stays, for looking up tokens
        packed_twice = head.weight.nbytes if head.weight is getattr(embedding, "weight", None) else 0
    return Sizes(total, state, total + packed_twice, kept_bytes(module) if is_quantized else {})


def num_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def kept_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of the floating-point tensors that no quantized layer replaced, by what they are, largest first."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, part in module.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for own_name, tensor in tensors:
            kind = _kind(name, part, own_name, tensor)
            if kind is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                counts[kind] += tensor.nbytes
    return dict(counts.most_common())


def _kind(name: str, owner: nn.Module, own_name: str, tensor: torch.Tensor) -> str | None:
    """Why a tensor is not quantized, in a few words; None if it is."""
    if isinstance(owner, QuantizedLinear | QuantizedEmbedding):
        return "norms and biases" if own_name == "bias" else None
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return "norms and biases" if own_name in owner._parameters else "tables that are computed"
    if isinstance(owner, nn.Embedding):
        is_plain = type(owner) is nn.Embedding
        return "embeddings that are not of tokens" if is_plain else "embeddings with a rule of their own"
    if name.rpartition(".")[2] in ROUTERS:
        return "routers, which decide by small differences"
    if isinstance(owner, nn.Linear | Conv1D):
        return "layers of a shape that the method cannot store"
    return "weights that are not linear layers"


def _longest_list(module: nn.Module, length: int) -> list[nn.Module]:
    """The decoder layers: the first list of modules that is as long as the configuration says."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    return next((list(child) for child in lists if len(child) == length), [])


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((int(value) for name in names if (value := getattr(config, name, None))), None)
