"""Attention over the paged KV cache, registered with transformers as the implementation "cadenza".

transformers' modeling code calls it once per layer with the keys and values of the step's rows, which go to the cache
before anything is read. How they are read is the business of a device's own module, `tiled_attention` for CPUs and
`fused_attention` for GPUs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.packed_rows import PackedRows

NAME = "cadenza"
TILE = 64
"""Prompts are computed in tiles of so many tokens, at multiples of it."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What an attention layer is, whatever the rows."""

    layer: int
    scale: float
    window: int | None
    """A token sees the last so many positions, its own included."""
    softcap: float | None
    """Gemma 2's tanh limit on scores."""
    sinks: Tensor | None
    """gpt-oss' attention sinks, [H]."""


class AttentionBatch(Protocol):
    """What attention must know of one step."""

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv], any strides but the last, which is 1: [T, H, Dv]."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    kept: Tensor
    """[n] int64: the rows whose logits are wanted."""
    attention: AttentionBatch


class AttentionBackend(Protocol):
    """`tiled_attention` or `fused_attention`."""

    @property
    def order(self) -> Callable[[int], int] | None:
        """What decode rows are sorted by: a function of their positions."""

    def step_inputs(
        self, rows: PackedRows, kept: Sequence[int], cache: KVCache, device: torch.device
    ) -> StepInputs: ...


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # transformers hands every attention function everything; `probe` proves that we use what matters
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, H, Dv]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = LayerCall(layer, scale, sliding_window, softcap, s_aux)
    rows = (part[0].transpose(0, 1) for part in (query, key, value))
    return attention_batch.attend(call, *rows).unsqueeze(0), None


# No mask is registered, so none is made: transformers would look at the positions for it, and wait for the device.
AttentionInterface.register(NAME, paged_attention)
