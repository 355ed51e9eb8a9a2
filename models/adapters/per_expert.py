"""Adapters of mixtures from before transformers 5, when every expert had three linear layers of its own.

Now all experts of a layer share two parameters, of which the first has the gate's rows above the up-projection's. Low
ranks add up: what two layers have becomes one change of the sum of their ranks, the second matrix block-diagonal, as
peft converts them. Knows one module at a time.
"""

from collections.abc import Mapping

import numpy as np
import regex

from cadenza.models.adapters.adapter import LowRank
from cadenza.models.adapters.arrays import Array, as_array, as_tensor
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.low_rank import Terms, check_shapes, checked_rank
from cadenza.models.errors import ModelError

_GATE, _UP, _DOWN = "gate_up_proj: gate", "gate_up_proj: up", "down_proj"
_LAYERS = {"w1": _GATE, "gate_proj": _GATE, "w3": _UP, "up_proj": _UP, "w2": _DOWN, "down_proj": _DOWN}
_NAME = regex.compile(r"(\d+)\.(\w+)\.lora_A\.weight")
Pair = tuple[Array, Array]


def take_per_expert(group: Group, terms: Terms) -> dict[str, LowRank]:
    """By the parameter's name; experts that the adapter lacks are unchanged."""
    shapes = group.site.shapes
    if group.site.is_transposed or not {"gate_up_proj", "down_proj"} <= shapes.keys():
        return {}
    found = [match for rest in group.tensors if (match := _NAME.fullmatch(rest)) and match[2] in _LAYERS]
    if not found:
        return {}
    if terms.config.use_rslora:
        raise ModelError(
            f"use_rslora is not supported for experts as transformers 4 had them: {group.trained_name}"
        )
    pairs: dict[str, dict[int, Pair]] = {_GATE: {}, _UP: {}, _DOWN: {}}
    for match in found:
        pairs[_LAYERS[match[2]]][int(match[1])] = _take(group, terms, int(match[1]), match[2])
    in_up, in_down = (pairs[_GATE], pairs[_UP]), (pairs[_DOWN],)
    stacked = {
        name: _stacked(shapes[name], parts)
        for name, parts in (("gate_up_proj", in_up), ("down_proj", in_down))
        if any(parts)
    }
    return stacked


def _take(group: Group, terms: Terms, expert: int, layer: str) -> Pair:
    stem = f"{expert}.{layer}"
    num_experts, doubled, width = group.site.shapes["gate_up_proj"]
    if expert >= num_experts:
        raise ModelError(f"the adapter has {group.trained_name}.{stem}, the model {num_experts} experts")
    pair = group.take_pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    assert pair is not None
    name, sizes = f"{group.trained_name}.{stem}", (width, doubled // 2)
    sizes = sizes[::-1] if _LAYERS[layer] == _DOWN else sizes
    check_shapes(name, *pair, checked_rank(name, terms), sizes, ("input", "output"))
    return as_array(pair[0]), as_array(pair[1]) * terms.config.scaling_of(name)


def _stacked(shape: tuple[int, ...], parts: tuple[Mapping[int, Pair], ...]) -> LowRank:
    """parts: of each block of rows, by expert; where ranks differ, zeros fill them up."""
    num_experts, out_features, in_features = shape
    ranks = [max((a.shape[0] for a, _ in part.values()), default=0) for part in parts]
    dtype = np.result_type(*(array for part in parts for pair in part.values() for array in pair))
    a = np.zeros((num_experts, sum(ranks), in_features), dtype)
    b = np.zeros((num_experts, out_features, sum(ranks)), dtype)
    rows = out_features // len(parts)
    for place, part in enumerate(parts):
        start = sum(ranks[:place])
        for expert, (first, second) in part.items():
            stop = start + first.shape[0]
            a[expert, start:stop] = first
            b[expert, place * rows : (place + 1) * rows, start:stop] = second
    return LowRank(as_tensor(a), as_tensor(b))
