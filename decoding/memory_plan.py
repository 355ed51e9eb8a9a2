"""How much memory the KV cache gets, and how long a sequence may be: numbers in, a decision with its reasons out.

The engine asks when a model is loaded, and `cadenza plan` before it is, so that the two cannot disagree. Knows
nothing of modules or tensors, nor where the numbers come from.
"""

from dataclasses import dataclass

from cadenza.decoding.attention import TILE
from cadenza.models import ModelError

GIB = 1024**3
_CPU_SHARE, _CPU_CEILING = 0.4, 4 * GIB
_GPU_SHARE = 0.9
_LEAST_TOKENS = 2 * TILE
_GATHERED = 2.0
"""What attention copies at once, over one layer's share of the cache: keys and values of the rows that are computed
together, rounded up to a length class (4/3), and what the product itself puts aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a model and an engine's configuration want of a device. Sizes in bytes."""

    device: str
    is_gpu: bool
    block_size: int
    """Tokens."""
    max_num_seqs: int
    context: int
    """Tokens of the longest sequence that the model, or the user, allows."""
    independent_context: int | None
    """Tokens up to which a row's result is its own affair; None: any number."""
    bytes_per_token: int
    """Of KV cache, over all layers, those of a draft model too."""
    largest_layer: int
    """The same of the layer that has most."""
    step_bytes: int
    """Activations and logits of a step, estimated, and the adapters that it computes with."""
    asked_bytes: int | None = None
    """What the user wants for the KV cache."""
    allotted_bytes: int | None = None
    """What a memory budget leaves for the KV cache."""
    free_bytes: int | None = None
    """Once the weights are loaded; None: the system does not say."""

    @property
    def most_useful_blocks(self) -> int:
        """So many that every sequence can be as long as it may."""
        return self.max_num_seqs * (-(-self.context // self.block_size) + 1)

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def room_bytes(self) -> int | None:
        """The largest KV cache beside which a step can still be computed."""
        if self.free_bytes is None:
            return None
        copied = _GATHERED * self.largest_layer / self.bytes_per_token
        return max(0, int((self.free_bytes - self.step_bytes) / (1 + copied)))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine makes of a `Demand`."""

    demand: Demand
    num_blocks: int
    reason: str
    """Why the KV cache is not larger."""
    max_model_len: int
    """Tokens of the longest sequence that is taken."""
    context_reason: str
    """Why it is not longer."""

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.demand.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.demand.bytes_per_block

    @property
    def full_length_concurrency(self) -> int:
        """Sequences of `max_model_len` tokens that run at once."""
        blocks = -(-self.max_model_len // self.demand.block_size)
        return min(self.demand.max_num_seqs, self.num_blocks // blocks)

    @property
    def full_concurrency_length(self) -> int:
        """Tokens that each of `max_num_seqs` sequences may have so that none waits."""
        tokens = self.num_blocks // self.demand.max_num_seqs * self.demand.block_size
        return min(self.max_model_len, tokens)


def plan_memory(demand: Demand) -> MemoryPlan:
    """Raises `ModelError`, with the numbers, where too much was asked for or too little is there."""
    budget, reason = _asked(demand) or _default(demand)
    num_blocks = budget // demand.bytes_per_block
    if num_blocks >= demand.most_useful_blocks:
        num_blocks = demand.most_useful_blocks
        reason = f"{demand.max_num_seqs} sequences of {demand.context} tokens, all that can be used"
    if num_blocks * demand.block_size < _LEAST_TOKENS:
        raise ModelError(
            f"{budget / GIB:.2f} GiB of KV cache ({reason}) hold {num_blocks * demand.block_size} tokens; at least"
            f" {_LEAST_TOKENS} are needed, {_LEAST_TOKENS * demand.bytes_per_token / GIB:.3f} GiB"
        )
    limits = [
        (demand.context, "the model's context"),
        (num_blocks * demand.block_size, "the KV cache's size"),
        (
            demand.independent_context or demand.context,
            "the length up to which its rotary embedding ignores other sequences",
        ),
    ]
    return MemoryPlan(demand, num_blocks, reason, *min(limits, key=lambda limit: limit[0]))


def _asked(demand: Demand) -> tuple[int, str] | None:
    """(bytes, reason) as the user wants it, if that can be had."""
    asked, room = demand.asked_bytes, demand.room_bytes
    if asked is None:
        return None
    if demand.allotted_bytes is not None and asked > demand.allotted_bytes:
        raise ModelError(
            f"--kv-cache-memory-gb {asked / GIB:.2f} is more than the {demand.allotted_bytes / GIB:.2f} GiB that"
            " --max-memory leaves for it"
        )
    if room is not None and asked > room:
        useful = demand.most_useful_blocks * demand.bytes_per_block
        raise ModelError(
            f"--kv-cache-memory-gb {asked / GIB:.2f} is more than {demand.device} can give: {_free(demand)} are free,"
            f" about {demand.step_bytes / GIB:.2f} of them for a step, which leaves {room / GIB:.2f};"
            f" {demand.max_num_seqs} sequences of {demand.context} tokens could use {useful / GIB:.2f} at most"
        )
    return asked, "--kv-cache-memory-gb"


def _default(demand: Demand) -> tuple[int, str]:
    """(bytes, reason): the smallest of all limits."""
    limits, free = [], demand.free_bytes
    if demand.allotted_bytes is not None:
        limits.append((demand.allotted_bytes, "what --max-memory leaves"))
    elif not demand.is_gpu or free is None:
        limits.append((_CPU_CEILING, f"4 GiB, {_ceiling_reason(demand)}"))
    if free is not None and demand.allotted_bytes is None:
        share = _GPU_SHARE if demand.is_gpu else _CPU_SHARE
        limits.append((int(free * share), f"{share:.0%} of the {_free(demand)} that are free"))
    if demand.room_bytes is not None:
        limits.append((demand.room_bytes, f"what a step leaves of the {_free(demand)} that are free"))
    return min(limits, key=lambda limit: limit[0])


def _ceiling_reason(demand: Demand) -> str:
    return "as the free memory is not known" if demand.is_gpu else "the default's ceiling on a CPU"


def _free(demand: Demand) -> str:
    assert demand.free_bytes is not None
    return f"{demand.free_bytes / GIB:.2f} GiB"
