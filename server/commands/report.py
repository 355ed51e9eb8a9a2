"""The start-up report of `cadenza serve`: what there is, what there is room for, what computes, where time went.

One line per fact, of an engine's description; decides nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cadenza.server.commands.quantities import count, gib

if TYPE_CHECKING:
    from cadenza.decoding import EngineConfig
    from cadenza.decoding.adapters.library import AdapterInfo
    from cadenza.decoding.description import EngineDescription
    from cadenza.decoding.memory_plan import MemoryPlan


_MOST_NAMED = 8
"""More adapters than that are counted, not named."""


def report_lines(
    engine: "EngineDescription",
    stages: Mapping[str, float],
    total: float,
    url: str,
    adapters: str | None = None,
) -> list[str]:
    """stages: seconds, of `total`; adapters: what there is to say of them."""
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
    lines = [
        f"model     {engine.model}: {engine.dtype} on {engine.device}",
        f"weights   {_weights(engine)}",
        f"context   {engine.memory.max_model_len} tokens; KV cache for {engine.memory.num_tokens} tokens",
        f"memory    {gib(engine.memory.num_bytes)} for the KV cache: {engine.memory.reason}",
        f"at once   {at_once(engine.memory)}",
        f"kernels   {engine.kernels}",
        f"hardware  {engine.hardware}",
    ]
    if engine.drafts is not None:
        lines.append(f"drafts    {engine.drafts}")
    if adapters is not None:
        lines.append(f"adapters  {adapters}")
    return [*lines, f"loaded    in {total:.2f} s ({spent})", f"ready     {url}/v1"]


def adapters_line(config: "EngineConfig", adapters: "Sequence[AdapterInfo]") -> str | None:
    """Which there are, and what there is room for; None where requests cannot name any."""
    if not config.enable_lora:
        return None
    kept, rank = config.adapters_in_memory, config.max_lora_rank
    bounds = f"{config.max_loras} in a step, {kept} in memory, of rank {rank} or less"
    if not adapters:
        return f"none yet; {bounds}"
    named = ", ".join(f"{adapter.name} (rank {adapter.rank})" for adapter in adapters[:_MOST_NAMED])
    more = f" and {len(adapters) - _MOST_NAMED} more" if len(adapters) > _MOST_NAMED else ""
    size = gib(sum({adapter.digest: adapter.num_bytes for adapter in adapters}.values()))
    return f"{named}{more}, {size}; {bounds}"


def _weights(engine: "EngineDescription") -> str:
    stored = engine.dtype if engine.quantization == "none" else engine.quantization
    place = (
        ""
        if engine.offload is None
        else f" on {engine.device}, {gib(engine.offloaded_bytes)} {engine.offload}"
    )
    text = f"{gib(engine.weight_bytes)}{place}: {count(engine.num_parameters)} parameters in {stored}"
    if not engine.full_precision_bytes:
        return text
    kept = ", ".join(f"{gib(size)} {what}" for what, size in engine.full_precision_bytes.items())
    return f"{text}; in {engine.dtype}: {kept}"


def at_once(memory: "MemoryPlan") -> str:
    """How many sequences run together, at full length and at the most."""
    most = memory.demand.max_num_seqs
    full = f"{memory.full_length_concurrency} of {memory.max_model_len} tokens"
    if memory.full_length_concurrency >= most:
        return f"{full} (max_num_seqs)"
    return f"{full}, or {most} (max_num_seqs) of {memory.full_concurrency_length}"
