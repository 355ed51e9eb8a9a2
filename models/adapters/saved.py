"""Whole parameters in an adapter: modules_to_save, trained biases, and embeddings that were saved beside it.

Knows which modules may have more rows than the model's, for added tokens; not how many tokens there are.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cadenza.models.adapters.arrays import as_array, transposed
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.layout import Layout
from cadenza.models.errors import ModelError

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The modules whose rows are tokens."""

    layout: Layout

    def may_grow(self, name: str) -> bool:
        return name in (self.layout.input_embedding, self.layout.output_embedding)

    def is_base(self, group: Group, weight: Tensor, base: BaseWeights) -> bool:
        """peft saves embeddings whole (save_embedding_layers) even when they are as they were."""
        name, layout = group.name, self.layout
        if not self.may_grow(name) or weight.shape[0] != group.site.shapes["weight"][0]:
            return False
        if name == layout.output_embedding and not layout.is_tied:
            return np.array_equal(as_array(weight), as_array(base.linear(name)))
        table, rows = layout.input_embedding, weight.shape[0]
        return all(
            np.array_equal(
                as_array(weight[start : start + _ROWS_AT_ONCE]),
                as_array(base.embedding(table, start, min(start + _ROWS_AT_ONCE, rows))),
            )
            for start in range(0, rows, _ROWS_AT_ONCE)
        )


def take_parameter(group: Group, parameter: str, vocabulary: Vocabulary) -> Tensor | None:
    """What the adapter has in place of a parameter, the way round that layers multiply with; None: nothing.

    It is `NAME.PARAMETER` of a module in modules_to_save, or `NAME.base_layer.PARAMETER` of one that is adapted as
    well. With save_embedding_layers peft also writes what its wrappers held: the module before the training, and a
    second copy of the trained one.
    """
    saved = group.take(parameter)
    if saved is not None:
        _drop_duplicates(group, parameter, saved)
        if any(rest.startswith("lora_") for rest in group.tensors) and parameter == "weight":
            raise ModelError(f"{group.name} is saved whole and adapted, too; that is two meanings")
    below = [
        tensor
        for rest in (f"base_layer.{parameter}", f"token_adapter.base_layer.{parameter}")
        if (tensor := group.take(rest)) is not None
    ]
    found = [tensor for tensor in (saved, *below) if tensor is not None]
    if len(found) > 1:
        raise ModelError(f"the adapter has two tensors for {group.name}.{parameter}")
    if not found:
        return None
    _check_shape(group, parameter, found[0], vocabulary)
    is_turned = group.site.is_transposed and parameter == "weight"
    return transposed(found[0]) if is_turned else found[0]


def _drop_duplicates(group: Group, parameter: str, saved: Tensor) -> None:
    group.take(f"original_module.{parameter}")
    copy = group.take(f"modules_to_save.{parameter}")
    if copy is not None and not (
        copy.shape == saved.shape and np.array_equal(as_array(copy), as_array(saved))
    ):
        raise ModelError(f"the adapter has two tensors for {group.name}.{parameter}, which differ")


def _check_shape(group: Group, parameter: str, tensor: Tensor, vocabulary: Vocabulary) -> None:
    """Only the vocabulary's modules may have more rows than the model's."""
    wanted, shape = group.site.shapes.get(parameter), tuple(tensor.shape)
    if wanted is None:
        raise ModelError(f"the adapter has {group.name}.{parameter}, which the model has not")
    is_longer = vocabulary.may_grow(group.name) and shape[1:] == wanted[1:] and shape[:1] > wanted[:1]
    if shape != wanted and not is_longer:
        raise ModelError(f"{group.name}.{parameter} has shape {shape}, the model's has {wanted}")
