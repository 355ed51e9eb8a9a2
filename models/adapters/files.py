"""The tensors of an adapter, read into memory from `adapter_model.safetensors`. Pickles are never opened.

Knows nothing of what the tensors mean.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from cadenza.models.adapters.arrays import is_finite, numpy_dtype
from cadenza.models.adapters.locate import WEIGHTS
from cadenza.models.errors import ModelError
from cadenza.models.memory import available_bytes
from cadenza.models.weights import tensors_of

PICKLE = "adapter_model.bin"


def read_tensors(folder: Path) -> Mapping[str, Tensor]:
    """By name, in the order of their names, in memory of their own: the file may change afterwards. Raises `ModelError`
    for what is damaged, no floating-point number, infinite or not a number."""
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / PICKLE).exists():
            raise ModelError(f"the adapter has a pickle ({PICKLE}) and no {WEIGHTS}; pickles are not loaded")
        raise ModelError(f"the adapter has no {WEIGHTS}")
    try:
        places, size = tensors_of(file), file.stat().st_size
        if not places:
            raise ModelError(f"{WEIGHTS} has no tensors")
        free = available_bytes(torch.device("cpu"))
        if free is not None and size > free:
            raise ModelError(f"{WEIGHTS} has {size} bytes, and only {free} of memory are free")
        return _read_all(file, size, places)
    except ModelError as error:
        raise ModelError(str(error).replace(str(file), WEIGHTS)) from error
    except (OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ModelError(f"{WEIGHTS} is damaged or cannot be read") from error


def _read_all(
    file: Path, size: int, places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """size: of the file, which its tensors never exceed together: a header might name the same bytes a thousand
    times."""
    tensors, left = {}, size
    with file.open("rb") as stream:
        for name in sorted(places):
            tensors[name] = _read(stream, size, name, *places[name])
            left -= tensors[name].nbytes
            if left < 0:
                raise ModelError(f"{WEIGHTS} is damaged: its tensors overlap")
    return tensors


def _read(
    stream: BinaryIO, size: int, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """size: of the file."""
    kind, count = numpy_dtype(dtype), prod(shape)
    if kind is None:
        raise ModelError(
            f"{name} has type {dtype}; an adapter's tensors are float64, float32, float16 or bfloat16"
        )
    if min(shape, default=0) < 0 or offset < 0 or offset + count * dtype.itemsize > size:
        raise ModelError(f"{WEIGHTS} is damaged: {name} of shape {shape} does not fit into it")
    stream.seek(offset)
    values = np.fromfile(stream, kind, count)
    if values.size != count:
        raise ModelError(f"{WEIGHTS} is damaged: it ends within {name}")
    tensor = torch.from_numpy(values.reshape(shape))
    tensor = tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
    if not is_finite(tensor):
        raise ModelError(f"{name} has values that are infinite or not numbers")
    return tensor
