"""From a loaded model to an engine's core: layers replaced and proven, KV cache sized, parts put together."""

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cadenza.decoding import probe
from cadenza.decoding.adapters.runtime import AdapterRuntime
from cadenza.decoding.adapters.tables import slot_bytes
from cadenza.decoding.bitmask import BitmaskFiller
from cadenza.decoding.block_pool import BlockPool
from cadenza.decoding.config import NGRAM, EngineConfig, demand
from cadenza.decoding.core import EngineCore
from cadenza.decoding.description import EngineDescription, describe
from cadenza.decoding.kv_cache import KVCache, LayerShape
from cadenza.decoding.logits import LogitsPipeline, LogprobsMode
from cadenza.decoding.memory_plan import MemoryPlan, plan_memory
from cadenza.decoding.runner import ModelRunner, selects_logits
from cadenza.decoding.scheduler import Scheduler
from cadenza.decoding.speculation.base import Drafter
from cadenza.decoding.speculation.draft_model import DraftModelDrafter
from cadenza.decoding.speculation.ngram import NgramDrafter
from cadenza.decoding.speculation.sharing import CPU_COST, GPU_COST
from cadenza.decoding.speculation.speculator import Speculator
from cadenza.decoding.warm_up import warm_up, warm_up_layers
from cadenza.kernels import ops
from cadenza.models import LoadedModel, ModelError
from cadenza.models.adapters.layout import Layout, layout_of
from cadenza.models.allocator import large_blocks_apart
from cadenza.models.memory import available_bytes
from cadenza.models.packing import can_pack, pack, watch_elsewhere, watch_siblings
from cadenza.models.sizing import kept_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    core: EngineCore
    adapters: AdapterRuntime | None
    memory: MemoryPlan
    description: EngineDescription


def assemble(model: LoadedModel, config: EngineConfig, draft: LoadedModel | None = None) -> Assembly:
    """Takes the models over, on the thread that will run them. Raises ModelError where they, or the configuration,
    cannot work."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # kernels run on the current one
    relative_size = 0.0
    if draft is not None:
        _check_vocabulary(model, draft)
        relative_size = draft.num_parameters / model.num_parameters
    kept = {} if model.quantization == "none" else kept_bytes(model.module)
    shapes, layout = _replace_layers(model, config.block_size, wants_layout=config.enable_lora)
    adapters = None
    if layout is not None:
        adapters = AdapterRuntime(
            model.module,
            layout,
            model.dtype,
            model.device,
            num_slots=config.max_loras,
            max_rank=config.max_lora_rank,
            selects_logits=selects_logits(model.module),
        )
    draft_shapes = [] if draft is None else _replace_layers(draft, config.block_size, wants_layout=False)[0]
    memory = plan_memory(
        demand(
            config,
            model,
            [*shapes, *draft_shapes],
            probe.longest_independent_context(model.config),
            available_bytes(model.device),
            0 if layout is None else slot_bytes(layout, config.max_loras, config.max_lora_rank, model.dtype),
        )
    )
    num_blocks = memory.num_blocks
    cache = KVCache(shapes, num_blocks, config.block_size, model.dtype, model.device)
    pool = BlockPool(num_blocks, config.block_size)
    scheduler = Scheduler(
        pool,
        config.max_num_seqs,
        config.tokens_per_step(model.device),
        config.enable_prefix_caching,
        None if adapters is None else adapters.slots,
    )
    num_columns = None if adapters is None else int(model.config.vocab_size)
    pipeline = _pipeline(model, config.logprobs_mode, num_columns)
    drafter: Drafter | None = NgramDrafter() if config.speculative == NGRAM else None
    step_cost = CPU_COST if model.device.type == "cpu" else GPU_COST
    if draft is not None:
        draft_cache = KVCache(draft_shapes, num_blocks, config.block_size, draft.dtype, draft.device)
        drafter = DraftModelDrafter(
            ModelRunner(draft.module, draft_cache, draft.device),
            draft_cache,
            pipeline,
            _vocab_size(model),
            min(draft.max_model_len, probe.longest_independent_context(draft.config) or draft.max_model_len),
            step_cost.least * relative_size,
        )
    core = EngineCore(
        pool,
        scheduler,
        ModelRunner(model.module, cache, model.device, adapters),
        pipeline,
        BitmaskFiller(_vocab_size(model)),
        Speculator(scheduler, drafter, config.num_speculative_tokens, step_cost),
    )
    if memory.max_model_len < model.max_model_len:
        log.warning("sequences are limited to %d tokens by %s", memory.max_model_len, memory.context_reason)
    return Assembly(core, adapters, memory, describe(model, config, memory, kept))


def _pipeline(model: LoadedModel, mode: LogprobsMode, num_columns: int | None) -> LogitsPipeline:
    if ops.runs_triton(model.device):
        from cadenza.decoding.fused_logits import FusedLogitsPipeline

        pipeline = FusedLogitsPipeline(model.tokenizer.vocab_size, mode, num_columns)
        warm_up(pipeline, int(model.config.vocab_size), model.dtype, model.device)
        return pipeline
    return LogitsPipeline(model.tokenizer.vocab_size, mode, num_columns)


def _vocab_size(model: LoadedModel) -> int:
    return min(model.tokenizer.vocab_size, int(model.config.vocab_size))


def _check_vocabulary(model: LoadedModel, draft: LoadedModel) -> None:
    size, (own, other) = _vocab_size(model), (model.tokenizer, draft.tokenizer)
    is_equal = own is other or all(own.token_bytes(at) == other.token_bytes(at) for at in range(size))
    if _vocab_size(draft) != size or not is_equal:
        raise ModelError(
            f"{draft.name} cannot draft for {model.name}: their vocabularies differ"
            f" ({_vocab_size(draft)} and {size} tokens)"
        )
    if (draft.dtype, draft.device) != (model.dtype, model.device):
        raise ModelError(
            f"{draft.name} cannot draft for {model.name}: it is {draft.dtype} on {draft.device},"
            f" not {model.dtype} on {model.device}"
        )


def _replace_layers(
    model: LoadedModel, block_size: int, *, wants_layout: bool
) -> tuple[list[LayerShape], Layout | None]:
    """Put our attention into the model, and on a CPU our linear layers, on a GPU our kernels; prove that it computes
    the same. Returns what each layer keeps in the KV cache, and what adapters may change where that is asked for."""
    module = model.module
    watching: AbstractContextManager[Collection[str]] = nullcontext(())
    if wants_layout:
        watching = watch_elsewhere(module, probe.NUM_TOKENS)
    with (  # one run only: quantized layers are slow until they are packed
        watch_siblings(module) as siblings,
        watching as elsewhere,
    ):
        expected = probe.eager_logits(module)
    layout = layout_of(module, elsewhere) if wants_layout else None
    with large_blocks_apart():
        packs_floats = can_pack(model.device, model.dtype)
        pack(module, siblings, packs_floats=packs_floats, on_cpu=model.device.type == "cpu")
    if ops.runs_triton(model.device):
        from cadenza.models.fusion.fuse import fuse

        log.info("kernels in place of the model's own: %s", fuse(module))
        warm_up_layers(module, model.device)
    shapes = probe.layer_shapes(module, model.config)
    if probe.is_quantized(module):
        expected = probe.check_operators(module, expected)
    probe.check(module, shapes, block_size, expected)
    return shapes, layout
