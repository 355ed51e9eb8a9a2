"""Rotations that spread outliers, so that 8 bits are enough: blocks of activations times a Hadamard matrix.

A few channels of a transformer's hidden states are tens of times larger than the rest, and one scale for a whole row
leaves the rest with few levels. For an orthogonal H, x Wᵀ = (x H)(W H)ᵀ: weights are turned once, when they are
quantized, and activations as they come; afterwards no element of a block is much larger than the others. The idea is
QuaRot's (Ashkboos et al. 2024); here blocks of at most 64 suffice. SmolLM2-135M's perplexity on this repository's
documents rose by 3.4 % in int8 without and by 0.5 % with it.

Knows nothing of integers. A row's result does not depend on the other rows, to the last bit.
"""

import functools

import torch
from torch import Tensor

from cadenza.models.linear import PackedLinear

_LARGEST = 64


def block_size(width: int) -> int:
    """The largest power of 2 up to 64 that divides `width`; 1 leaves everything as it is."""
    return min(_LARGEST, width & -width)


@functools.cache
def hadamard(size: int) -> Tensor:
    """Sylvester's, [size, size] float32 of ±1, symmetric; divided by sqrt(size) it is orthogonal. size: power of 2."""
    if size == 1:
        return torch.ones(1, 1)
    half = hadamard(size // 2)
    return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


def rotate_weight(weight: Tensor) -> Tensor:
    """[n, k] floating-point → [n, k] float32 such that x weightᵀ = rotate(x) @ rotate_weight(weight)ᵀ."""
    size = block_size(weight.shape[1])
    return _times_hadamard(weight.float(), size) / size


def restore_weight(weight: Tensor) -> Tensor:
    """Undoes `rotate_weight`."""
    return _times_hadamard(weight, block_size(weight.shape[1]))


def _times_hadamard(weight: Tensor, size: int) -> Tensor:
    return (weight.reshape(-1, size) @ _hadamard_on(weight.device, size)).view(weight.shape)


@functools.cache
def _hadamard_on(device: torch.device, size: int) -> Tensor:
    return hadamard(size).to(device)


def rotate(x: Tensor) -> Tensor:
    """[..., k] → [..., k] float32: every block times the matrix of ±1, which makes its norm sqrt(size) times larger."""
    size = block_size(x.shape[-1])
    if size == 1:
        return x.float()
    blocks = x.float().reshape(-1, size)
    if x.device.type != "cpu":
        return (blocks @ _hadamard_on(x.device, size)).view(x.shape)
    packed = _packed(size, torch.get_num_threads())
    return (butterflies(blocks) if packed is None else packed.forward(blocks)).view(x.shape)


@functools.cache
def _packed(size: int, num_threads: int) -> PackedLinear | None:
    """None where this machine has no product that sums every number of rows in one order with so many threads."""
    if not torch.backends.mkldnn.is_available():
        return None
    with torch.inference_mode(False):
        packed = PackedLinear(hadamard(size), None)
    return packed if packed.is_row_invariant else None


def butterflies(blocks: Tensor) -> Tensor:
    """[n, size] → [n, size]: the same by the fast Walsh-Hadamard transform, sums and differences of pairs only."""
    count, size = blocks.shape
    half = 1
    while half < size:
        pairs = blocks.view(count, -1, 2, half)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack((one + other, one - other), 2).view(count, size)
        half *= 2
    return blocks
