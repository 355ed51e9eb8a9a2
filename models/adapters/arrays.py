"""Arithmetic on an adapter's tensors with numpy, whose loops use the calling thread alone.

torch would start a second team of threads beside the engine's. numpy has no bfloat16: its values are taken from their
bits. Nothing here multiplies matrices through BLAS, which has threads of its own. Knows no adapters.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating[Any]]
_NUMPY_DTYPES: dict[torch.dtype, type[np.floating[Any]]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
}
_BFLOAT16_EXPONENT = 0x7F80


def as_array(tensor: Tensor) -> Array:
    """In float32, or float64 where the tensor has that; a view where nothing needs converting."""
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    values: Array = tensor.numpy()
    return values.astype(np.float32) if tensor.dtype == torch.float16 else values


def as_tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16) & _BFLOAT16_EXPONENT
        return bool((bits != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(tensor.numpy()).all())


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """factor · tensor, in float32 or float64; as it is where the factor is 1."""
    return tensor if factor == 1 else as_tensor(as_array(tensor) * as_array(tensor).dtype.type(factor))


def transposed(tensor: Tensor) -> Tensor:
    """With its last two dimensions swapped, in memory of its own: a copy, of the same dtype."""
    if tensor.dtype == torch.bfloat16:
        bits = np.ascontiguousarray(tensor.view(torch.int16).numpy().swapaxes(-1, -2))
        return torch.from_numpy(bits).view(torch.bfloat16)
    return as_tensor(tensor.numpy().swapaxes(-1, -2))


def numpy_dtype(dtype: torch.dtype) -> type[np.generic] | None:
    """Of the same size, to read a tensor's bytes as; None: a type that adapters do not have."""
    return np.int16 if dtype == torch.bfloat16 else _NUMPY_DTYPES.get(dtype)
