"""torchao checkpoints in safetensors: int8, float8 and smaller integers in int8, as they are. Needs only torch.

Beside each weight's data lie its scales, and zeros if it has any, of one size of group. What is packed for one device's
operator, as int4 for GPUs is, cannot be read. Activations stay in the precision that is computed in.
"""

from collections.abc import Mapping
from typing import Any

import torch

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Parts, Stored, layers_with, parts_of
from cadenza.models.prequantized.lattice import Lattice, by_output

_DATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_READABLE = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def torchao(config: Mapping[str, Any]) -> Format:
    return Format("torchao", 8, _weights)


def _weights(stored: Parts) -> dict[str, Stored]:
    found = {}
    for layer in layers_with(stored, _DATA):
        names = parts_of(stored, layer, _DATA, _SCALE, _ZERO)
        if _SCALE not in names:
            raise ModelError(f"{layer}{_DATA} lacks its {_SCALE}")
        data, scale = stored[names[_DATA]], stored[names[_SCALE]]
        if data.dtype not in _READABLE or data.ndim != 2:
            raise ModelError(
                f"{layer}{_DATA} is {data.dtype} {list(data.shape)}, packed in a way that is not known"
            )
        if scale.ndim == 2 and (len(scale) not in (1, len(data)) or data.shape[1] % scale.shape[1]):
            raise ModelError(
                f"{layer}{_SCALE} is {list(scale.shape)}, which fits no {list(data.shape)} weight"
            )
        found[layer + "weight"] = Stored(names, tuple(data.shape), _read)
    return found


def _read(parts: Parts) -> Lattice:
    data, zeros = parts[_DATA], parts.get(_ZERO)
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    spread = None if zeros is None else by_output(zeros, len(data))
    return Lattice(data, by_output(parts[_SCALE].float(), len(data)), spread)
