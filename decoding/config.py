"""What an engine is set up with, and how much KV cache it gets. Parsed once, frozen, passed down."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch

from cadenza.decoding.adapters.module import LoraModule, first_duplicate
from cadenza.decoding.attention import TILE
from cadenza.decoding.kv_cache import LayerShape
from cadenza.decoding.logits import LogprobsMode
from cadenza.decoding.memory_plan import Demand
from cadenza.kernels.sampling import ROWS_AT_ONCE
from cadenza.models import ModelError
from cadenza.models.offload.budget import StepNeeds
from cadenza.models.offload.placement import activation_bytes

NGRAM = "ngram"
_SAMPLED_COPIES = 32
"""Of a row of logits, which sampling over the whole vocabulary makes beside the four that are always counted: sorted
values, their tokens in 64 bits, sums, noise. Measured: 35 in all for flat distributions that are cut by top-p."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The names and meanings are those of the command line's flags."""

    max_num_seqs: int = 64
    """Branches that are computed together."""
    max_num_batched_tokens: int | None = None
    """Tokens per step. None: 512 on a CPU, 4096 on a GPU."""
    kv_cache_memory_gb: float | None = None
    """In units of 1024³ bytes. None: on a CPU 40 % of the free memory, at most 4; on a GPU 90 % of it; less where a
    step's activations would not fit beside it."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_queue: int = 512
    """Requests that may wait for their turn; more are refused."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    max_logprobs: int = 20
    seed: int | None = None
    """Makes requests without a seed of their own reproducible, by order of arrival."""
    speculative: str | None = None
    """Who drafts tokens for the model to check several of them in a step: "ngram", what followed the last few tokens
    before; otherwise a smaller model of the same vocabulary, named as the model is."""
    num_speculative_tokens: int = 8
    """At most so many drafts for one branch in a step."""
    enable_lora: bool = False
    """Requests may name adapters."""
    max_loras: int = 8
    """Different adapters that one step computes with; requests for more wait."""
    max_lora_rank: int = 16
    """Adapters of a higher rank are refused."""
    max_cpu_loras: int | None = None
    """Adapters in host memory, those on the device included; others are read again from their files when they are
    asked for. None: twice `max_loras`, and no fewer than there are from the start."""
    lora_modules: tuple[LoraModule, ...] = ()
    """The adapters that are there from the start."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ModelError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.block_size < 1 or TILE % self.block_size:
            raise ModelError(f"block_size must divide {TILE}, got {self.block_size}")
        least = self.max_num_seqs + TILE
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < least:
            raise ModelError(
                f"max_num_batched_tokens must be at least max_num_seqs + {TILE} = {least},"
                f" got {self.max_num_batched_tokens}"
            )
        asked = self.kv_cache_memory_gb
        if asked is not None and not (isfinite(asked) and asked > 0):
            raise ModelError(f"kv_cache_memory_gb must be above 0, got {asked}")
        if self.max_queue < 1:
            raise ModelError(f"max_queue must be at least 1, got {self.max_queue}")
        if self.num_speculative_tokens < 1:
            raise ModelError(f"num_speculative_tokens must be at least 1, got {self.num_speculative_tokens}")
        self._check_adapters()

    def _check_adapters(self) -> None:
        for name in ("max_loras", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ModelError(
                f"max_cpu_loras must be at least max_loras ({self.max_loras}), got {self.max_cpu_loras}"
            )
        if self.lora_modules and not self.enable_lora:
            raise ModelError("lora_modules needs enable_lora")
        twice = first_duplicate(module.name for module in self.lora_modules)
        if twice is not None:
            raise ModelError(f"lora_modules names {twice} twice")

    @property
    def adapters_in_memory(self) -> int:
        """The bound on adapters in host memory."""
        if self.max_cpu_loras is not None:
            return self.max_cpu_loras
        return max(2 * self.max_loras, len(self.lora_modules))

    @property
    def draft_source(self) -> str | None:
        """The model that drafts, if one does."""
        return None if self.speculative == NGRAM else self.speculative

    def tokens_per_step(self, device: torch.device) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(512 if device.type == "cpu" else 4096, self.max_num_seqs + TILE)

    def step_needs(self, device: torch.device) -> StepNeeds:
        """What the loader must leave of a memory budget."""
        asked = self.kv_cache_memory_gb
        return StepNeeds(
            kv_cache_bytes=None if asked is None else int(asked * 1024**3),
            num_tokens=self.tokens_per_step(device),
            num_rows=self.max_num_seqs * (1 + (self.num_speculative_tokens if self.speculative else 0)),
            num_seqs=self.max_num_seqs,
            least_kv_tokens=2 * TILE,
        )


class Plannable(Protocol):
    """What must be known of a model, loaded or not, to say how much KV cache it gets."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def config(self) -> Any: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def kv_cache_bytes(self) -> int | None: ...


def demand(
    config: EngineConfig,
    model: Plannable,
    shapes: Sequence[LayerShape],
    independent_context: int | None,
    free_bytes: int | None,
    adapter_bytes: int = 0,
) -> Demand:
    """shapes: of all layers that keep something under a block's id, a draft model's too; adapter_bytes: of slots."""
    asked = config.kv_cache_memory_gb
    per_layer = [shape.bytes_per_token(model.dtype) for shape in shapes]
    return Demand(
        device=str(model.device),
        is_gpu=model.device.type != "cpu",
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        context=model.max_model_len,
        independent_context=independent_context,
        bytes_per_token=sum(per_layer),
        largest_layer=max(per_layer),
        step_bytes=step_bytes(config, model) + adapter_bytes,
        asked_bytes=None if asked is None else int(asked * 1024**3),
        allotted_bytes=model.kv_cache_bytes,
        free_bytes=free_bytes,
    )


def step_bytes(config: EngineConfig, model: Plannable) -> int:
    """What a step takes beside weights and KV cache, at the most, estimated. A memory budget does not count rows that
    are sampled from the whole vocabulary, which is rare; free memory that is given away must last for them, too."""
    needs = config.step_needs(model.device)
    activations = activation_bytes(model.config, model.dtype, needs)
    if model.kv_cache_bytes is not None:
        return activations
    rows = min(needs.num_rows, needs.num_tokens, ROWS_AT_ONCE)
    return activations + _SAMPLED_COPIES * rows * int(model.config.vocab_size) * 4
