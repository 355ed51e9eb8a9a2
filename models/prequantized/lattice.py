"""What every format of quantized weights comes down to: values, zeros and scales, shared by groups of weights.

Knows no format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """A weight [out, in] = (values − zeros) · scales."""

    values: Tensor
    """[out, in]; integers, or floating-point numbers of few bits."""
    scales: Tensor
    """[out, groups] float; groups of equally many inputs, in order unless `group_of` says otherwise."""
    zeros: Tensor | None = None
    """[out, groups] as `scales`; None: all 0."""
    group_of: Tensor | None = None
    """[in] int: the group of each input."""

    def dequantized(self) -> Tensor:
        """[out, in] float32, each weight rounded once."""
        weight = self.values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.group_of is None:
            groups = weight.view(len(weight), self.scales.shape[1], -1)
            if self.zeros is not None:
                groups.sub_(self.zeros.float()[..., None])
            groups.mul_(self.scales.float()[..., None])
            return weight
        if self.zeros is not None:
            weight.sub_(self.zeros.float()[:, self.group_of])
        return weight.mul_(self.scales.float()[:, self.group_of])


def group_of_each(in_features: int, group_size: int) -> Tensor | None:
    """[in] int64 for groups that follow each other, the last one shorter; None where all are equally long."""
    if in_features % group_size == 0:
        return None
    return torch.arange(in_features) // group_size


def by_output(given: Tensor, out_features: int, rows_together: int | None = None) -> Tensor:
    """One number, [out], [out, groups], or [blocks, groups] of so many outputs each → [out, groups]."""
    given = given.reshape(-1, 1) if given.ndim < 2 else given
    if len(given) == out_features:
        return given
    if len(given) == 1:
        return given.expand(out_features, -1)
    assert rows_together is not None
    assert -(-out_features // rows_together) == len(given), given.shape
    return given.repeat_interleave(rows_together, dim=0)[:out_features]


def unpack(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 → [rows, n · 32 / bits] uint8: the integers that lie in the words, lowest bits first.

    Integers may straddle two words, as they do for three bits.
    """
    rows, width = words.shape
    if 32 % bits == 0:
        integers = torch.empty(rows, width, 32 // bits, dtype=torch.uint8)
        for place in range(32 // bits):  # not all at once: a layer in int32 is as large as in float32
            integers[..., place] = (words >> bits * place) & (2**bits - 1)
        return integers.view(rows, -1)
    single = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    stream = single.view(rows, width * 32)[:, : width * 32 // bits * bits].view(rows, -1, bits)
    return (stream << torch.arange(bits, dtype=torch.int32)).sum(-1).to(torch.uint8)
