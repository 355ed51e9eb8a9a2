"""bitsandbytes checkpoints: nf4 and fp4 in blocks, int8 by rows. Needs only torch.

4 bits: values of a table by index, two to a byte, the first in the high half; a scale for each block of the flattened
weight, which may itself be stored in 8 bits; a JSON text in a tensor says shapes and sizes. 8 bits: integers and each
row's largest absolute value, which 127 stands for.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Parts, Stored, parts_of
from cadenza.models.prequantized.lattice import Lattice

_STATE = "quant_state.bitsandbytes__"


def bitsandbytes(config: Mapping[str, Any]) -> Format:
    if config.get("load_in_8bit"):
        return Format("bitsandbytes int8", 8, _int8_weights, ("weight_format",))
    kind = str(config.get("bnb_4bit_quant_type", "fp4"))
    return Format(f"bitsandbytes {kind}", 4, _four_bit_weights)


def _int8_weights(stored: Parts) -> dict[str, Stored]:
    found = {}
    for name in stored:
        layer = name.removesuffix("SCB")
        if layer == name:
            continue
        kind = stored.get(layer + "weight_format")
        if kind is not None and int(kind) != 0:
            raise ModelError(
                f"{layer}weight is not stored by rows; save it again with a current bitsandbytes"
            )
        names = parts_of(stored, layer, "weight", "SCB")
        found[layer + "weight"] = Stored(names, tuple(stored[layer + "weight"].shape), _read_int8)
    return found


def _read_int8(parts: Parts) -> Lattice:
    return Lattice(parts["weight"], parts["SCB"].float()[:, None] / 127)


def _four_bit_weights(stored: Parts) -> dict[str, Stored]:
    found = {}
    for name in stored:
        weight, separator, _ = name.partition(f".{_STATE}")
        if not separator:
            continue
        state = json.loads(bytes(stored[name].tolist()))
        parts = {"values": weight, "state": name}
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if f"{weight}.{part}" in stored:
                parts[part] = f"{weight}.{part}"
        found[weight] = Stored(parts, tuple(state["shape"]), partial(_read_four_bit, state=state))
    return found


def _read_four_bit(parts: Parts, state: Mapping[str, Any]) -> Lattice:
    """One group for each block: they are taken from the flattened weight, so a block may cross rows."""
    out_features, in_features = state["shape"]
    halves = parts["values"].flatten().view(torch.uint8)
    indices = torch.stack((halves >> 4, halves & 0xF), -1).flatten()[: out_features * in_features].int()
    values = parts["quant_map"].float()[indices]
    scales, block = _scales(parts, state), int(state["blocksize"])
    if in_features % block == 0:
        return Lattice(values.view(out_features, in_features), scales.view(out_features, -1))
    spread = scales.repeat_interleave(block)[: len(values)]
    return Lattice((values * spread).view(out_features, in_features), torch.ones(out_features, 1))


def _scales(parts: Parts, state: Mapping[str, Any]) -> Tensor:
    """[blocks] float32."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax.float()
    coarse = parts["nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: len(absmax)]
    nested = parts["nested_quant_map"].float()[absmax.int()] * coarse
    return nested + float(state.get("nested_offset", 0.0))
