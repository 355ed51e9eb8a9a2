"""The engine's numbers at one moment, for those who watch it."""

from collections.abc import Iterable
from dataclasses import dataclass

from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.core import EngineCore


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    """Requests with a branch in the batch."""
    num_waiting: int
    kv_cache_usage: float
    """Share of the blocks that some branch holds, 0 … 1."""
    prefix_cache_queries: int
    """Tokens looked up."""
    prefix_cache_hits: int
    """Tokens found."""
    prompt_tokens_total: int
    generation_tokens_total: int
    num_preemptions: int
    spec_decode_num_drafts: int
    """Times that tokens were drafted for a branch."""
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
    running_adapters: tuple[str, ...]
    """Names that requests with a branch in the batch have asked for, each once."""
    waiting_adapters: tuple[str, ...]
    """Those of branches that wait."""


def stats_of(core: EngineCore, num_arrived: int) -> EngineStats:
    """From any thread. num_arrived: requests that the core has not heard of yet."""
    in_batch, in_line = list(core.scheduler.running), list(core.scheduler.waiting)
    running = {branch.order[1] for branch in in_batch}
    waiting = {branch.order[1] for branch in in_line} - running
    return EngineStats(
        num_running=len(running),
        num_waiting=len(waiting) + num_arrived,
        kv_cache_usage=core.pool.num_held / core.pool.num_blocks,
        prefix_cache_queries=core.scheduler.prefix_cache_queries,
        prefix_cache_hits=core.scheduler.prefix_cache_hits,
        prompt_tokens_total=core.tokens.prompt,
        generation_tokens_total=core.tokens.generated,
        num_preemptions=core.scheduler.num_preemptions,
        spec_decode_num_drafts=core.speculation.num_drafts,
        spec_decode_num_draft_tokens=core.speculation.num_draft_tokens,
        spec_decode_num_accepted_tokens=core.speculation.num_accepted_tokens,
        running_adapters=_named(branch.adapters for branch in in_batch),
        waiting_adapters=_named(branch.adapters for branch in in_line),
    )


def _named(sets: Iterable[AdapterSet | None]) -> tuple[str, ...]:
    return tuple(sorted({name for adapters in sets if adapters is not None for name in adapters.names}))
