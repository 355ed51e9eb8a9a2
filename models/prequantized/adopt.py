"""Weights that are quantized already, taken over as they are by a method that can hold them.

Rounding a lattice to another lattice loses a second time; integers that fit are kept, and only their scales change
type. Knows which methods have which tensors.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.kernels.int4_linear import ROWS
from cadenza.models.prequantized.lattice import Lattice
from cadenza.models.prequantized.weights import DequantizedWeights
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.int4 import Int4, group_size_for
from cadenza.models.quantization.llm_int8 import LLMInt8
from cadenza.models.quantization.swap import Replaced
from cadenza.models.weights import FileWeights


def adopted(entry: Replaced, original: FileWeights) -> Mapping[str, Tensor] | None:
    """The tensors of `entry.method` for a weight that it can hold as it is; None for all others."""
    is_whole = not entry.is_transposed and entry.expert is None
    if entry.method is None or not is_whole or not isinstance(original, DequantizedWeights):
        return None
    lattice = original.lattice(entry.weight_name)
    return None if lattice is None else _taken_over(lattice, entry.method)


def _taken_over(lattice: Lattice, method: Method) -> Mapping[str, Tensor] | None:
    if lattice.values.dtype.is_floating_point or lattice.group_of is not None:
        return None
    if isinstance(method, LLMInt8):
        return _int8(lattice)
    return _int4(lattice, method) if isinstance(method, Int4) else None


def _int8(lattice: Lattice) -> Mapping[str, Tensor] | None:
    """Rows of int8 with one scale and no zero."""
    if lattice.scales.shape[1] != 1 or lattice.zeros is not None or lattice.values.dtype != torch.int8:
        return None
    return {"qweight": lattice.values, "scale": lattice.scales[:, 0].float().contiguous()}


def _int4(lattice: Lattice, method: Int4) -> Mapping[str, Tensor] | None:
    """Integers that 16 levels hold, in groups that the method's divide: w = (q - 8) · scale + zero."""
    (out_features, in_features), num_groups = lattice.values.shape, lattice.scales.shape[1]
    group_size = group_size_for(in_features, method.group_size)
    values = lattice.values.to(torch.int16)
    low, high = int(values.min()), int(values.max())
    offset = 0 if low >= 0 else 8
    if (
        low + offset < 0
        or high + offset > 15
        or in_features // num_groups % group_size
        or in_features % group_size
    ):
        return None
    scales = lattice.scales.float()
    middles = torch.zeros_like(scales) if lattice.zeros is None else lattice.zeros.float()
    zeros = (8 - offset - middles) * scales
    repeats = in_features // num_groups // group_size
    pairs = torch.stack((scales, zeros), -1).repeat_interleave(repeats, dim=1)
    padding = -out_features % ROWS
    return {
        "qweight": method.layout.pack(F.pad((values + offset).to(torch.uint8), (0, 0, 0, padding))),
        "scales_and_zeros": F.pad(pairs.transpose(0, 1), (0, 0, 0, padding)).to(torch.bfloat16).contiguous(),
    }
