"""Chooses 4-bit integers, scales and zeros for groups of weights: w ≈ (q - 8) * scale + zero, q from 0 to 15.

Knows numbers only.
"""

import torch
from torch import Tensor

_LEVELS = 15
_AT_ONCE = 2**20


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [rows, columns], any floating-point type, columns a multiple of `group_size`.

    Integers [rows, columns] uint8, scales and zeros [rows, columns / group_size] bfloat16.
    """
    rows, columns = weight.shape
    integers = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group_size, dtype=torch.bfloat16)
    zeros = torch.empty_like(scales)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = weight[part].float().unflatten(1, (-1, group_size))
        scale, zero = _from_extremes(groups)
        scales[part], zeros[part] = scale, zero
        integers[part] = _round(groups, scale, zero).flatten(1)
    return integers, scales, zeros


def _from_extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: [r, G, g]. [r, G] float32 that are bfloat16's: what maps the smallest weight to 0, the largest to 15."""
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / _LEVELS).bfloat16().float()
    return scale, ((low + high + scale) / 2).bfloat16().float()


def _round(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest integers, given scale and zero as they will be stored."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    quotient = torch.addcmul((8.5 - zero * inverse[..., 0])[..., None], groups, inverse)
    return quotient.clamp_(0, _LEVELS + 0.5).to(torch.uint8)
