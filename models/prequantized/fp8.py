"""fp8 checkpoints: DeepSeek's blocks ("fp8"), and rows ("fbgemm_fp8"). Only e4m3 and e5m2 weights with float scales.

Each weight has a scale tensor beside it: one number, one for each output, or one for each block of outputs and inputs.
Activations stay in the precision that is computed in, so their scales are left unread.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Parts, Stored, parts_of
from cadenza.models.prequantized.lattice import Lattice, by_output, group_of_each

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_IGNORED = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")


def fp8(config: Mapping[str, Any]) -> Format:
    if config.get("scale_fmt", "float") != "float" or config.get("expert_dtype", "fp8") != "fp8":
        raise ModelError("fp8 checkpoints with ue8m0 scales or fp4 experts cannot be read")
    size = config.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    return Format("fp8", 8, partial(_weights, block=block), _IGNORED)


def _weights(stored: Parts, block: tuple[int, int] | None) -> dict[str, Stored]:
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype not in _FLOAT8:
            continue
        layer, _, last = name.rpartition(".")
        names = parts_of(stored, f"{layer}.", f"{last}_scale_inv", f"{last}_scale")
        if len(names) != 1:
            raise ModelError(f"{name} is {tensor.dtype} and has {len(names)} scales beside it, not one")
        (scale,) = names.values()
        shape = tuple(stored[scale].shape)
        if len(shape) == 2 and shape[1] > 1 and (block is None or shape != _num_blocks(tensor.shape, block)):
            raise ModelError(
                f"{scale} is {list(shape)}, which fits no {list(tensor.shape)} weight in blocks of {block}"
            )
        found[name] = Stored(
            {"weight": name, "scale": scale}, tuple(tensor.shape), partial(_read, block=block)
        )
    return found


def _num_blocks(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _read(parts: Parts, block: tuple[int, int] | None) -> Lattice:
    weight, scale = parts["weight"], parts["scale"].float()
    if block is None or scale.ndim < 2 or tuple(scale.shape) != _num_blocks(weight.shape, block):
        return Lattice(weight, by_output(scale, len(weight)))
    return Lattice(
        weight, by_output(scale, len(weight), block[0]), None, group_of_each(weight.shape[1], block[1])
    )
