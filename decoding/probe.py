"""Finding out what a model's attention layers look like, and proving that our attention computes the same.

transformers has hundreds of architectures. Rather than trust a list, each model is asked: a few tokens go through
it once with its own eager attention and once through the paged path. A model that cannot work here (attention
outside transformers' registry, ALiBi, state-space layers, …) is refused by name before it answers anything wrong.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cadenza.decoding import attention
from cadenza.decoding.block_pool import prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.kv_cache import KVCache, LayerShape
from cadenza.decoding.runner import ModelRunner
from cadenza.decoding.scheduler import Span, Step
from cadenza.models import ModelError
from cadenza.models.errors import one_line
from cadenza.models.quantization.base import QuantizedLinear
from cadenza.models.quantization.experts import ExpertStack

_NAME = "cadenza_probe"
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FAILURES = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)
_OPERATOR_LIMIT = 0.5
_NUM_PROMPT_TOKENS, _NUM_DECODE_TOKENS = 12, 2
NUM_TOKENS = _NUM_PROMPT_TOKENS + _NUM_DECODE_TOKENS
"""Of the trial runs."""


def _record_shapes(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    recorded_shapes: dict[int, list[LayerShape]],
    recorded_windows: list[int],
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], query.shape[1] // key.shape[1])
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    recorded_shapes.setdefault(layer, []).append(shape)
    if sliding_window is not None:
        recorded_windows.append(sliding_window)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_NAME, _record_shapes)
AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)


@torch.inference_mode()
def layer_shapes(module: Any, config: Any, *, on_meta: bool = False) -> list[LayerShape]:
    """The KV cache shape of every attention layer. Raises ModelError for a model that cannot be served.

    on_meta: the module is made of shapes alone, and not to be used for anything else.
    """
    name = type(module).__name__
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ModelError(f"{name}: layers of type {', '.join(sorted(unknown))} are not supported")
    recorded: dict[int, list[LayerShape]] = {}
    windows: list[int] = []
    device = torch.device("meta") if on_meta else _device(module)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device)[None]
    extra = {}
    try:
        # values decide who computes a token's experts, and where a sequence begins that has no mask
        if on_meta:
            module.set_experts_implementation("batched_mm")
            extra["attention_mask"] = torch.ones_like(ids)
        module.set_attn_implementation(_NAME)
        module(
            **extra,
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            recorded_shapes=recorded,
            recorded_windows=windows,
        )
    except _FAILURES as error:
        reason = one_line(error)
        raise ModelError(f"{name}: its attention cannot be replaced by the paged one ({reason})") from error
    num_layers = config.num_hidden_layers
    if sorted(recorded) != list(range(num_layers)) or any(len(calls) != 1 for calls in recorded.values()):
        raise ModelError(
            f"{name}: {len(recorded)} of {num_layers} layers use transformers' attention interface exactly once;"
            " such an architecture cannot use the paged KV cache"
        )
    if _expects_window(config) and not windows:
        raise ModelError(
            f"{name}: its sliding window is only in transformers' masks, which are not used here"
        )
    return [recorded[layer][0] for layer in range(num_layers)]


def _expects_window(config: Any) -> bool:
    """Whether some layer of the model looks back over less than the whole context."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return False
    layer_types = getattr(config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)


def longest_independent_context(config: Any) -> int | None:
    """The length up to which a token's rotary embedding is a function of its own position; None: any.

    Beyond it "dynamic" and "longrope" embeddings change with the longest sequence of the forward pass, so that
    one request would change another's answer.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in per_layer_type or [parameters]:
        if rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits, default=None)


@torch.inference_mode()
def eager_logits(module: Any) -> Tensor:
    """Logits [tokens, V] of a few tokens, by transformers' own eager attention and the module as it is."""
    try:
        module.set_attn_implementation("eager")
        # positions of its own: some models do not count from 0
        output = module(input_ids=torch.tensor([_tokens(module)], device=_device(module)), use_cache=False)
    except _FAILURES as error:
        raise ModelError(f"{type(module).__name__}: a trial run failed ({one_line(error)})") from error
    logits: Tensor = output.logits[0].float()
    return logits


@torch.inference_mode()
def check_operators(module: Any, expected: Tensor) -> Tensor:
    """Compare quantized layers, now packed, with what they gave as dequantized weights; the packed layers' logits.

    They round activations, too, so that only the size of the difference tells a wrong operator from a right one.
    """
    actual = eager_logits(module)
    difference = float((actual - expected).norm() / expected.norm().clamp_min(1e-6))
    if not difference <= _OPERATOR_LIMIT:
        raise ModelError(
            f"{type(module).__name__}: the operators for its quantized layers do not compute what they should here:"
            f" logits differ by a factor of {difference:.1e}"
        )
    return actual


@torch.inference_mode()
def check(module: Any, shapes: list[LayerShape], block_size: int, expected: Tensor) -> None:
    """Compare the logits of the paged path with `eager_logits`; raises ModelError where they differ.

    Leaves the module with our attention switched on.
    """
    name = type(module).__name__
    try:
        module.set_attn_implementation(attention.NAME)
        actual = _paged_logits(module, shapes, block_size)
    except _FAILURES as error:
        raise ModelError(f"{name}: the paged attention does not run ({one_line(error)})") from error
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    is_exact = _dtype(module) == torch.float32 and not is_quantized(module)
    limit = 1e-3 if is_exact else 1e-1
    if any(isinstance(part, ExpertStack) for part in module.modules()):
        limit = 5e-1  # where experts are as good as equal, rounding decides which are asked
    if not bool(difference <= limit):
        raise ModelError(
            f"{name}: logits through the paged KV cache differ from transformers' own by a factor of"
            f" {float(difference):.1e}; this architecture is not supported"
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether it has layers that may round activations."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def _tokens(module: Any) -> list[int]:
    vocab_size = module.get_input_embeddings().num_embeddings
    return [(7919 * i + 13) % vocab_size for i in range(NUM_TOKENS)]


def _device(module: Any) -> torch.device:
    """Tensors of layers that wait elsewhere are on meta; a quantized model may have buffers only."""
    tensors = chain(module.parameters(), module.buffers())
    devices: Iterator[torch.device] = (tensor.device for tensor in tensors if not tensor.is_meta)
    return next(devices)


def _dtype(module: nn.Module) -> torch.dtype:
    """Of activations. Of a quantized model's parameters there may be none, or only what must be float32."""
    layers = (part.dtype for part in module.modules() if isinstance(part, QuantizedLinear))
    return next(layers, None) or next(module.parameters()).dtype


def _paged_logits(module: Any, shapes: list[LayerShape], block_size: int) -> Tensor:
    """Logits [tokens, V]: a prompt chunk, then the rest as decode rows."""
    tokens = _tokens(module)
    num_blocks = -(-len(tokens) // block_size)
    device = _device(module)
    cache = KVCache(shapes, num_blocks, block_size, _dtype(module), device)
    text = TextStream(IncrementalDetokenizer(_NoText(), (), True), StopStringFilter((), False))
    branch = Branch(
        order=(0, 0, 0),
        index=0,
        num_prompt_tokens=_NUM_PROMPT_TOKENS,
        token_ids=tokens[:_NUM_PROMPT_TOKENS],
        text=text,
        cache_root=prefix_root(),
        block_table=list(range(num_blocks)),
    )
    runner = ModelRunner(module, cache, device)
    parts = [runner(Step([Span(branch, 0, _NUM_PROMPT_TOKENS)]), [branch]).logits]
    for position in range(_NUM_PROMPT_TOKENS, len(tokens)):
        branch.token_ids.append(tokens[position])
        parts.append(runner(Step([Span(branch, position, position + 1)])).logits)
    return torch.cat(parts)


class _NoText:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""
