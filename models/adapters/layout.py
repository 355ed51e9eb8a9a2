"""What adapters may change in a model: its modules by name, with their shapes, before any layer is replaced."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from cadenza.models.offload.stream import StreamedLayer
from cadenza.models.quantization.base import QuantizedLinear
from cadenza.models.quantization.embedding import QuantizedEmbedding
from cadenza.models.quantization.experts import ExpertStack

Kind = Literal["linear", "embedding", "other"]


@dataclass(frozen=True, slots=True)
class Site:
    """One module that has weights of its own."""

    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters by name, as the model was trained: "weight" [out_features, in_features] of linear layers
    ([in_features, out_features] where `is_transposed`), [tokens, embedding_dim] of embeddings."""
    is_transposed: bool = False
    """GPT-2's `Conv1D`, quantized or not, whose weight lies the other way round in checkpoints, and experts whose
    parameters lie as [experts, in_features, out_features]."""
    is_everywhere: bool = True
    """It is given every token of the sequence, in order, once per forward pass. Only such a module can be told whose
    token each row is."""

    @property
    def in_features(self) -> int:
        return self.shapes["weight"][0 if self.is_transposed else 1]

    @property
    def out_features(self) -> int:
        return self.shapes["weight"][1 if self.is_transposed else 0]


@dataclass(frozen=True, slots=True)
class Layout:
    sites: Mapping[str, Site]
    """By the module's name in the model."""
    input_embedding: str
    output_embedding: str | None
    is_tied: bool
    """The output layer's weight is the input embedding's."""
    vocab_size: int
    """Rows of the input embedding, which may be more than there are tokens."""


def layout_of(module: Any, elsewhere: Collection[str] = ()) -> Layout:
    """Of a transformers model whose layers are not packed yet. elsewhere: modules that are not given every token in
    order."""
    holders = [part for part in module.modules() if isinstance(part, ExpertStack | StreamedLayer)]
    inside = {id(layer) for holder in holders for layer in holder.modules() if layer is not holder}
    names = {part: name for name, part in module.named_modules()}
    head = module.get_output_embeddings()
    embedding = names[module.get_input_embeddings()]
    sites = {}
    for name, part in module.named_modules():
        own = part.layer if isinstance(part, StreamedLayer) else part
        if id(part) not in inside and _has_weights(own):
            is_elsewhere = name in elsewhere or (name != embedding and _has_own_lookup(own))
            sites[name] = _site(own, is_elsewhere)
    return Layout(
        sites,
        embedding,
        None if head is None else names[head],
        bool(getattr(module.config, "tie_word_embeddings", False)),
        sites[embedding].shapes["weight"][0],
    )


def _has_weights(part: nn.Module) -> bool:
    is_quantized = isinstance(part, QuantizedLinear | QuantizedEmbedding) or bool(_stacks(part))
    return is_quantized or any(True for _ in part.parameters(recurse=False))


def _has_own_lookup(part: nn.Module) -> bool:
    """An embedding that is not given the rows of its table: OPT's positions begin at its third one."""
    return isinstance(part, nn.Embedding) and type(part) is not nn.Embedding


def _stacks(part: nn.Module) -> dict[str, ExpertStack]:
    """Quantized experts, each in place of a parameter."""
    return {name: child for name, child in part.named_children() if isinstance(child, ExpertStack)}


def _site(part: nn.Module, is_elsewhere: bool) -> Site:
    shapes = {name: tuple(parameter.shape) for name, parameter in part.named_parameters(recurse=False)}
    if isinstance(part, QuantizedLinear | QuantizedEmbedding):
        shapes["weight"] = tuple(part.weight.shape)
    is_transposed = bool(getattr(part, "is_transposed", False)) or isinstance(part, Conv1D)
    if isinstance(part, QuantizedLinear) and is_transposed:
        shapes["weight"] = (part.in_features, part.out_features)
    for name, stack in _stacks(part).items():
        first = stack.experts[0]
        assert isinstance(first, QuantizedLinear)
        shapes[name] = (len(stack.experts), first.out_features, first.in_features)
    if isinstance(part, nn.Linear | Conv1D | QuantizedLinear):
        return Site("linear", shapes, is_transposed, not is_elsewhere)
    is_embedding = isinstance(part, nn.Embedding | QuantizedEmbedding)
    return Site("embedding" if is_embedding else "other", shapes, is_transposed, not is_elsewhere)
