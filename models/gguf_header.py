"""Reads what a GGUF file says about itself: metadata and the table of tensors, no weights.

A fraction of a second where the gguf package's reader, which wraps each vocabulary entry in an array, takes
several. Also finds files that were cut short. Knows nothing of transformers.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cadenza.models.errors import ModelError

STRING, ARRAY = 8, 9
SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
"""struct formats of GGUF's fixed-size value types."""
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    metadata: dict[str, Any]
    """The file's key-value pairs, vocabulary included."""
    num_elements: int
    """Of all tensors together."""
    main_type: str = "F32"
    """What most elements are stored as, such as Q4_1."""


def read_header(path: Path) -> GGUFHeader:
    """Raises `ModelError` if this is not a whole GGUF file."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).header()
        except (struct.error, ValueError, IndexError, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise ModelError(f"{path} is not a whole GGUF file: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        elements = self._check_tensors(num_tensors, metadata)
        main_type = max(elements, key=lambda name: elements[name], default="F32")
        return GGUFHeader(metadata, sum(elements.values()), main_type)

    def _check_tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, int]:
        """The elements of all tensors by type; raises if the file ends before the last of them."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        elements: dict[str, int] = {}
        end = 0
        for _ in range(num_tensors):
            self._string()
            count = prod(self._scalar("<Q") for _ in range(self._scalar("<I")))
            kind = GGMLQuantizationType(self._scalar("<I"))
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
            end = max(end, self._scalar("<Q") + count // block_elements * block_bytes)
            elements[kind.name] = elements.get(kind.name, 0) + count
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        needed = (self._at + alignment - 1) // alignment * alignment + end
        if needed > len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, its tensors reach to {needed}")
        return elements

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        text = self._data[self._at : self._at + length]
        if len(text) != length:
            raise ValueError("it ends in the middle of a text")
        self._at += length
        return text.decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        element, length = self._scalar("<I"), self._scalar("<Q")
        if element not in SCALARS:
            return [self._value(element) for _ in range(length)]
        form = f"<{length}{SCALARS[element][1]}"
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return list(values)
