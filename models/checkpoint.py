"""What a model folder's weight files say before they are loaded: how big, which precision, whole or damaged.

Reads headers only, so it answers in milliseconds for any size. Knows nothing of architectures or devices.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cadenza.models.errors import ModelError, one_line

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8.0),
    **dict.fromkeys(("F32", "I32", "U32"), 4.0),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2.0),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1.0),
    "F4": 0.5,
}
FLOATS = ("F64", "F32", "F16", "BF16")
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one folder."""

    files: tuple[Path, ...]
    is_pickle: bool = False
    """The folder has no safetensors, and the user accepts a pickle."""

    @cached_property
    def headers(self) -> dict[Path, dict[str, Any]]:
        """Of each safetensors file, its table of tensors; raises `ModelError` if a file is damaged."""
        return {} if self.is_pickle else {file: read_header(file)[0] for file in self.files}

    def prefetch(self) -> None:
        """Ask the system to read the files ahead while other work goes on, where it takes such hints."""
        if hasattr(os, "posix_fadvise"):
            for path in self.files:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _tensors(self) -> Iterator[dict[str, Any]]:
        for header in self.headers.values():
            yield from header.values()

    @property
    def float_dtype(self) -> str | None:
        """The floating-point type that most elements have, in torch's spelling; None if none has."""
        counts: dict[str, int] = {}
        for tensor in self._tensors():
            if tensor["dtype"] in FLOATS:
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + _elements(tensor)
        names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return names[max(counts, key=lambda dtype: counts[dtype])] if counts else None

    def loaded_bytes(self, float_bytes: int) -> int:
        """Memory that the weights take when floating-point ones have `float_bytes` bytes per element."""
        if self.is_pickle:
            return sum(file.stat().st_size for file in self.files)
        return int(
            sum(
                _elements(tensor)
                * (float_bytes if tensor["dtype"] in FLOATS else DTYPE_BYTES[tensor["dtype"]])
                for tensor in self._tensors()
            )
        )

    def digest(self) -> str:
        """Changes when the weights do: names, sizes, headers, and samples of bytes all over each file."""
        hasher = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            hasher.update(f"{path.name}:{size}:{json.dumps(self.headers.get(path))}".encode())
            with path.open("rb") as file:
                for place in range(SAMPLES):
                    file.seek(max(0, (size - SAMPLE_BYTES) * place // (SAMPLES - 1)))
                    hasher.update(file.read(SAMPLE_BYTES))
        return hasher.hexdigest()


def open_checkpoint(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    """Find the weight files of the folder, every shard of them."""
    if files := _weight_files(folder, "model.safetensors"):
        return Checkpoint(files)
    pickles = _weight_files(folder, "pytorch_model.bin")
    if pickles and allow_pickle:
        return Checkpoint(pickles, is_pickle=True)
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only, which can run code when they are loaded; "
            "convert them to safetensors, or allow pickles if you trust their author"
        )
    raise ModelError(f"{folder} holds no weights (model.safetensors or model.safetensors.index.json)")


def _weight_files(folder: Path, single: str) -> tuple[Path, ...]:
    if (folder / single).is_file():
        return (folder / single,)
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged: {one_line(error)}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files, such as {missing[0]}")
    return tuple(folder / name for name in names)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The table of tensors of a safetensors file, and where their bytes begin. Raises `ModelError` if it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= size else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        unknown = {tensor["dtype"] for tensor in header.values()} - DTYPE_BYTES.keys()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is damaged: it does not begin with a safetensors header") from error
    if end != size:
        raise ModelError(f"{file} is damaged: it has {size} bytes, its header describes {end}")
    if unknown:
        raise ModelError(f"{file} holds tensors of type {sorted(unknown)[0]}, which is not supported")
    return header, 8 + length


def _elements(tensor: dict[str, Any]) -> int:
    count = 1
    for extent in tensor["shape"]:
        count *= extent
    return count
