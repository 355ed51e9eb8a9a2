"""The tensors of the paged KV cache. Which block belongs to whom is `block_pool`'s business."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cadenza.kernels.upload import upload


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one token leaves in the cache of one attention layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    group_size: int = 1
    """Query heads per key head, which the cache does not hold."""

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """Per layer, keys [num_blocks, block_size, num_kv_heads, key_dim] and values likewise.

    Zero-filled, because attention reads (and masks) slots that nothing was written to yet: a NaN there would
    survive the mask.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(heads: int, dim: int) -> Tensor:
            return _zeros((num_blocks, block_size, heads, dim), dtype, device)

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.group_sizes = sorted({shape.group_size for shape in shapes})
        self.keys = [zeros(shape.num_kv_heads, shape.key_dim) for shape in shapes]
        self.values = [zeros(shape.num_kv_heads, shape.value_dim) for shape in shapes]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key [T, num_kv_heads, key_dim] and value of T tokens at `slots` [T], block · block_size + offset."""
        self.keys[layer].view(-1, *key.shape[1:]).index_copy_(0, slots, key)
        self.values[layer].view(-1, *value.shape[1:]).index_copy_(0, slots, value)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [*blocks.shape[:-1], num_blocks · block_size, num_kv_heads, dim] of block ids `blocks`."""
        flat = blocks.reshape(-1)
        keys, values = (part.index_select(0, flat) for part in (self.keys[layer], self.values[layer]))
        leading = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        return keys.view(*leading, *keys.shape[2:]), values.view(*leading, *values.shape[2:])

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy block contents, (source, destination) each, in every layer."""
        if not pairs:
            return
        columns = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        sources, targets = upload(list(columns), self.keys[0].device)
        for part in (*self.keys, *self.values):
            part.index_copy_(0, targets, part.index_select(0, sources))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy asks the system for zeroed ones, which take no memory until they are used
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
