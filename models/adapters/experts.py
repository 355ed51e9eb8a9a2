"""Changes of modules that are neither linear layers nor embeddings: norms, routers, the experts of a mixture.

peft adapts a parameter (target_parameters) by wrapping its module, once for each parameter, one wrapper inside the
other: the file says only how deep a matrix lay. Knows one module at a time.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from cadenza.models.adapters.adapter import LowRank, ModuleChange
from cadenza.models.adapters.arrays import as_tensor, scaled, transposed
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.locate import CONFIG
from cadenza.models.adapters.low_rank import Terms, checked_rank, targeted_parameters
from cadenza.models.adapters.per_expert import take_per_expert
from cadenza.models.adapters.saved import Vocabulary, take_parameter
from cadenza.models.errors import ModelError


def module_change(group: Group, terms: Terms, vocabulary: Vocabulary) -> ModuleChange:
    values = {
        name: value
        for name in group.site.shapes
        if (value := take_parameter(group, name, vocabulary)) is not None
    }
    low_rank = _wrapped(group, terms) | take_per_expert(group, terms)
    if (values or low_rank) and any(name.startswith(f"{group.name}.") for name in vocabulary.layout.sites):
        raise ModelError(
            f"parameters of {group.name} cannot be changed: the module is made of other layers, too"
        )
    return ModuleChange(values, low_rank)


def _wrapped(group: Group, terms: Terms) -> dict[str, LowRank]:
    names = targeted_parameters(group, terms.config)
    if not names and len(group.site.shapes.get("weight", ())) == 2:  # a router that was a linear layer once
        pair = group.take_pair("lora_A.weight", "lora_B.weight")
        return (
            {} if pair is None else {"weight": _low_rank(group, "weight", group.trained_name, *pair, terms)}
        )
    pairs = []
    for depth in range(len(names)):
        inside = "base_layer." * depth
        pairs.append(group.take_pair(f"{inside}lora_A.weight", f"{inside}lora_B.weight"))
    names = _in_order(group, names, pairs)
    return {
        name: _low_rank(group, name, f"{group.trained_name}.{name}", *pair, terms)
        for name, pair in zip(names, pairs, strict=True)
        if pair is not None
    }


def _in_order(group: Group, names: list[str], pairs: list[tuple[Tensor, Tensor] | None]) -> list[str]:
    """From the outermost wrapper to the innermost. The parameter that comes first in the module was wrapped first:
    innermost. Parameters that were quantized come after those that were not; shapes tell what was first before."""
    likely = names[::-1]

    def fits(order: Sequence[str]) -> bool:
        return all(
            pair is None or (*pair[0].shape[-1:], *pair[1].shape[:1]) == _features(group, name)
            for name, pair in zip(order, pairs, strict=True)
        )

    return next((list(order) for order in permutations(likely) if fits(order)), likely)


def _features(group: Group, parameter: str) -> tuple[int, int]:
    """(in, out): of a parameter [out, in], [experts, out, in], or [experts, in, out] where the module is transposed."""
    shape = group.site.shapes[parameter]
    if len(shape) not in (2, 3) or (shape[0] == 1 and len(shape) == 3):
        name = f"{group.name}.{parameter}"
        raise ModelError(f"{name} of shape {shape} is no matrix, nor one for each of several experts")
    return (shape[1], shape[2]) if _is_turned(group, parameter) else (shape[-1], shape[-2])


def _is_turned(group: Group, parameter: str) -> bool:
    return len(group.site.shapes[parameter]) == 3 and group.site.is_transposed


def _low_rank(group: Group, parameter: str, pattern_name: str, a: Tensor, b: Tensor, terms: Terms) -> LowRank:
    """a: [experts · rank, in], expert by expert; b: [out, rank · experts], the experts together."""
    name, shape = f"{group.name}.{parameter}", group.site.shapes[parameter]
    in_features, out_features = _features(group, parameter)
    rank, scaling = checked_rank(pattern_name, terms), terms.config.scaling_of(pattern_name)
    num_experts = shape[0] if len(shape) == 3 else 1
    wanted = ((num_experts * rank, in_features), (out_features, num_experts * rank))
    for letter, tensor, size in (("A", a, wanted[0]), ("B", b, wanted[1])):
        if tuple(tensor.shape) != size:
            raise ModelError(
                f"lora_{letter} for {name} has shape {tuple(tensor.shape)}; the model's {shape} and rank {rank} of "
                f"{CONFIG} make it {size}"
            )
    if len(shape) == 2:
        return LowRank(a, scaled(b, scaling))
    first = a.reshape(num_experts, rank, in_features)
    second = _by_expert(scaled(b, scaling).reshape(out_features, rank, num_experts))
    if _is_turned(group, parameter):
        return LowRank(transposed(second), transposed(first))
    return LowRank(first, second)


def _by_expert(b: Tensor) -> Tensor:
    """[experts, out, rank] from [out, rank, experts], by one thread."""
    if b.dtype.itemsize == 2:
        bits = np.ascontiguousarray(b.view(torch.int16).numpy().transpose(2, 0, 1))
        return torch.from_numpy(bits).view(b.dtype)
    return as_tensor(b.numpy().transpose(2, 0, 1))
