"""What an engine is set up with, and how much KV cache it gets. Parsed once, frozen, passed down."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cadenza.decoding.attention import TILE
from cadenza.decoding.kv_cache import LayerShape
from cadenza.decoding.logits import LogprobsMode
from cadenza.models import LoadedModel, ModelError
from cadenza.models.memory import available_bytes

_CPU_SHARE, _CPU_CEILING = 0.4, 4 * 1024**3
_GPU_SHARE = 0.9
NGRAM = "ngram"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The names and meanings are those of the command line's flags."""

    max_num_seqs: int = 64
    """Branches that are computed together."""
    max_num_batched_tokens: int | None = None
    """Tokens per step. None: 512 on a CPU, 4096 on a GPU."""
    kv_cache_memory_gb: float | None = None
    """In units of 1024³ bytes. None: on a CPU 40 % of the free memory, at most 4; on a GPU 90 % of it."""
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
        if self.max_queue < 1:
            raise ModelError(f"max_queue must be at least 1, got {self.max_queue}")
        if self.num_speculative_tokens < 1:
            raise ModelError(f"num_speculative_tokens must be at least 1, got {self.num_speculative_tokens}")

    @property
    def draft_source(self) -> str | None:
        """The model that drafts, if one does."""
        return None if self.speculative == NGRAM else self.speculative

    def tokens_per_step(self, device: torch.device) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(512 if device.type == "cpu" else 4096, self.max_num_seqs + TILE)


def plan_blocks(config: EngineConfig, model: LoadedModel, shapes: Sequence[LayerShape]) -> int:
    """How many KV cache blocks to make: what the memory allows, but not more than the engine could ever fill.

    shapes: of all layers that keep something under a block's id, a draft model's too.
    """
    bytes_per_block = config.block_size * sum(shape.bytes_per_token(model.dtype) for shape in shapes)
    if config.kv_cache_memory_gb is not None:
        budget = int(config.kv_cache_memory_gb * 1024**3)
    else:
        free = available_bytes(model.device)
        if free is None:
            budget = _CPU_CEILING
        elif model.device.type == "cpu":
            budget = min(int(free * _CPU_SHARE), _CPU_CEILING)
        else:
            budget = int(free * _GPU_SHARE)
    most_useful = config.max_num_seqs * (-(-model.max_model_len // config.block_size) + 1)
    num_blocks = min(budget // bytes_per_block, most_useful)
    if num_blocks * config.block_size < 2 * TILE:
        raise ModelError(
            f"{budget / 1024**3:.2f} GiB of KV cache hold {num_blocks * config.block_size} tokens;"
            f" at least {2 * TILE} are needed, {2 * TILE * bytes_per_block / config.block_size / 1024**3:.3f} GiB"
        )
    return num_blocks
