"""A step's small arrays: brought to a device in one copy that nothing waits for, and its results back in another.

Every array begins at a multiple of 16 bytes, as kernels are compiled for. Knows nothing of what the numbers mean.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors of the shapes and types of `arrays`, int64, int32 or float32: views of one on the device."""
    sizes = [array.nbytes + -array.nbytes % _ALIGNMENT for array in arrays]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = whole.numpy()
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += size
    # torch's allocator of pinned memory keeps it until the copy is done
    parts = whole.to(device, non_blocking=True).split(sizes)
    return [
        part[: array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


def download(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """int32 and float32 tensors of one device, as arrays: one copy, which is waited for."""
    sizes = [tensor.numel() for tensor in tensors]
    whole = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in tensors]).cpu()
    return [
        part.view(tensor.dtype).view(tensor.shape).numpy()
        for part, tensor in zip(whole.split(sizes), tensors, strict=True)
    ]
