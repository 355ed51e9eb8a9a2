"""The parts that a model is moved in: decoder layers, the output layer, the token embedding, and the rest.

Knows nothing of budgets or devices.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from cadenza.models.errors import ModelError
from cadenza.models.sizing import num_bytes


@dataclass(frozen=True, eq=False)
class Part:
    """A module that is moved as a whole."""

    name: str
    module: nn.Module

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.module)


@dataclass(frozen=True)
class Parts:
    blocks: list[Part]
    """The layers that nothing may split, in the order of their names."""
    head: Part | None
    """The output layer."""
    embedding: Part | None
    """The token embedding, if rows can be looked up in it one by one."""

    @property
    def all(self) -> list[Part]:
        return [*self.blocks, *(part for part in (self.head, self.embedding) if part is not None)]


def parts_of(module: Any) -> Parts:
    """module: a transformers causal LM, whose tensors may be on meta. Raises `ModelError` if it has no layers."""
    from cadenza.models.quantization.embedding import QuantizedEmbedding

    names = {child: name for name, child in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    blocks = _blocks(module, {embedding, head})
    if not blocks:
        raise ModelError(f"{type(module).__name__} has no layers that could be offloaded one by one")
    inside = {child for part in blocks for child in part.module.modules()}
    is_table = isinstance(embedding, nn.Embedding | QuantizedEmbedding)
    return Parts(
        blocks,
        Part(names[head], head) if head in names and head not in inside else None,
        Part(names[embedding], embedding) if is_table and embedding not in inside else None,
    )


def _blocks(module: Any, apart: set[nn.Module]) -> list[Part]:
    """What transformers says must not be split; for a model that does not say, the layers of its longest list."""
    classes = set(module._no_split_modules or ())
    found: list[Part] = []
    for name, child in module.named_modules():
        is_inner = any(name.startswith(f"{part.name}.") for part in found)
        if type(child).__name__ in classes and not is_inner and not apart & set(child.modules()):
            found.append(Part(name, child))
    if found:
        return [part for part in found if part.num_bytes]
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    name, longest = max(lists, key=lambda entry: len(entry[1]), default=("", nn.ModuleList()))
    return [Part(f"{name}.{number}", child) for number, child in enumerate(longest)]
