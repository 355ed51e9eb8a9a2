"""Tensors where they lie on disk: named, typed, read when asked for, never all at once.

Knows nothing of models, quantization, devices or budgets.
"""

import mmap
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cadenza.models.checkpoint import read_header
from cadenza.models.errors import ModelError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of the safetensors format that torch has operators for."""
_READ_AT_ONCE = 128 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies, and as what it is wanted."""

    file: Path
    offset: int
    """Bytes from the file's beginning."""
    stored: torch.dtype
    shape: tuple[int, ...]
    wanted: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.stored.itemsize


class FileWeights(Mapping[str, Tensor]):
    """Tensors by the names that the module has for them.

    A tensor that is wanted as it is stored is a view of the file: read-only, and in memory only as long as the system
    likes. Any other is a converted copy.
    """

    def __init__(self, places: Mapping[str, Place], in_memory: Mapping[str, Tensor] | None = None) -> None:
        """in_memory: tensors that are in no file."""
        self._places = dict(places)
        self._in_memory = dict(in_memory or {})
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def of_safetensors(cls, files: Iterable[Path]) -> "FileWeights":
        """Every tensor of the files, as stored and under its stored name."""
        places = {}
        for file in files:
            for name, (offset, stored, shape) in tensors_of(file).items():
                places[name] = Place(file, offset, stored, shape, stored)
        return cls(places)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.as_stored(name)
        return tensor if name in self._in_memory else tensor.to(self._places[name].wanted)

    def as_stored(self, name: str) -> Tensor:
        """The tensor in the type that the file has it in: always a view of the file."""
        if name in self._in_memory:
            return self._in_memory[name]
        place = self._places[name]
        if place.num_bytes == 0:
            return torch.empty(place.shape, dtype=place.stored)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to weights
            raw = torch.frombuffer(
                self._map(place.file), dtype=torch.uint8, count=place.num_bytes, offset=place.offset
            )
        if place.offset % place.stored.itemsize:  # the format does not promise alignment
            raw = raw.clone()
        return raw.view(place.stored).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._in_memory
        yield from self._places

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._places)

    def identity(self, name: str) -> Hashable:
        """Equal for names of the same tensor."""
        return id(self._in_memory[name]) if name in self._in_memory else self._places[name]

    def num_bytes(self, name: str) -> int:
        """What the tensor takes as it is wanted."""
        if name in self._in_memory:
            return self._in_memory[name].nbytes
        return prod(self._places[name].shape) * self._places[name].wanted.itemsize

    def is_view(self, name: str) -> bool:
        """Whether the tensor, as it is wanted, is the file's own bytes."""
        return name in self._places and self._places[name].stored == self._places[name].wanted

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors while other work goes on, where it takes such hints.

        In small pieces: Linux reads no more for one hint than the disk's largest request.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for place in (self._places[name] for name in names if name in self._places):
            with place.file.open("rb") as file:
                end = place.offset + place.num_bytes
                for start in range(place.offset, end, _READ_AT_ONCE):
                    size = min(_READ_AT_ONCE, end - start)
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def release(self) -> None:
        """Give back the memory of what was read; tensors handed out stay valid and are read again when used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def tensors_of(file: Path) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
    """(offset in the file, dtype, shape) of each tensor in a safetensors file."""
    header, start = read_header(file)
    found = {}
    for name, tensor in header.items():
        if tensor["dtype"] not in SAFETENSORS_DTYPES:
            raise ModelError(f"{file} holds {name} as {tensor['dtype']}, which cannot be read here")
        place = start + tensor["data_offsets"][0]
        found[name] = (place, SAFETENSORS_DTYPES[tensor["dtype"]], tuple(tensor["shape"]))
    return found
