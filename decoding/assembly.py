"""From a loaded model to an engine's core: layers replaced and proven, KV cache sized, parts put together."""

import logging
from dataclasses import dataclass

from cadenza.decoding import probe
from cadenza.decoding.bitmask import BitmaskFiller
from cadenza.decoding.block_pool import BlockPool
from cadenza.decoding.config import EngineConfig, plan_blocks
from cadenza.decoding.core import EngineCore
from cadenza.decoding.kv_cache import KVCache, LayerShape
from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.runner import ModelRunner
from cadenza.decoding.scheduler import Scheduler
from cadenza.models import LoadedModel
from cadenza.models.packing import can_pack, pack, watch_siblings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    core: EngineCore
    num_kv_tokens: int
    max_model_len: int


def assemble(model: LoadedModel, config: EngineConfig) -> Assembly:
    """Takes the model over. Raises ModelError where it, or the configuration, cannot work."""
    shapes = _replace_layers(model, config.block_size)
    num_blocks = plan_blocks(config, model, shapes)
    num_kv_tokens = num_blocks * config.block_size
    cache = KVCache(shapes, num_blocks, config.block_size, model.dtype, model.device)
    pool = BlockPool(num_blocks, config.block_size)
    scheduler = Scheduler(
        pool, config.max_num_seqs, config.tokens_per_step(model.device), config.enable_prefix_caching
    )
    core = EngineCore(
        pool,
        scheduler,
        ModelRunner(model.module, cache, model.device),
        LogitsPipeline(model.tokenizer.vocab_size, config.logprobs_mode),
        BitmaskFiller(min(model.tokenizer.vocab_size, model.config.vocab_size)),
    )
    return Assembly(core, num_kv_tokens, _context_length(model, num_kv_tokens))


def _replace_layers(model: LoadedModel, block_size: int) -> list[LayerShape]:
    """Put our attention, and on a CPU our linear layers, into the model; prove that it computes the same."""
    module = model.module
    expected = probe.eager_logits(module)
    with watch_siblings(module) as siblings:
        shapes = probe.layer_shapes(module, model.config)
    if can_pack(model.device, model.dtype):
        pack(module, siblings)
    probe.check(module, shapes, block_size, expected)
    return shapes


def _context_length(model: LoadedModel, num_kv_tokens: int) -> int:
    limits = {
        "the model's context": model.max_model_len,
        "the KV cache's size": num_kv_tokens,
        "the length up to which its rotary embedding ignores other sequences": (
            probe.longest_independent_context(model.config) or model.max_model_len
        ),
    }
    reason, length = min(limits.items(), key=lambda limit: limit[1])
    if length < model.max_model_len:
        log.warning("sequences are limited to %d tokens by %s", length, reason)
    return length
