"""The quantized cache: a checkpoint is quantized once, tensor by tensor, and the outcome kept on disk.

Takes as much memory as the largest tensor. A folder is named by what it was made from and how, published whole or
not at all, and made by one process while others wait; see `models.cache`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from cadenza.models.cache import build_folder, cache_root, exclusive, is_intact, remembered_digest, say
from cadenza.models.checkpoint import Checkpoint
from cadenza.models.errors import ModelError
from cadenza.models.prequantized.adopt import adopted
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.swap import Replaced
from cadenza.models.weights import SAFETENSORS_DTYPES, FileWeights, tensors_of

OpenOriginal = Callable[[Path], AbstractContextManager[FileWeights]]
STORE_VERSION = 1
"""Part of every folder's name: raise it when the files' contents change for another reason than the method."""
FILE = "model.safetensors"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def store_folder(folder: Path, checkpoint: Checkpoint, method: Method, dtype: torch.dtype) -> Path:
    """Where this checkpoint's tensors are, or would be, as `method` makes them."""
    configuration = (folder / "config.json").read_text(encoding="utf-8")
    contents = [f"{file.name}:{remembered_digest(file)}" for file in checkpoint.files]
    parts = [str(STORE_VERSION), str(dtype), method.key, method.head.key, configuration, *contents]
    return cache_root() / "quantized" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def stored_weights(
    target: Path,
    name: str,
    module: nn.Module,
    replaced: Mapping[str, Replaced],
    open_original: OpenOriginal,
) -> FileWeights:
    """The tensors for `module`, whose layers have been replaced; made first unless an intact folder is at `target`.

    name: what to call the model to a person. open_original: gives the original tensors by name, when they are needed,
    and a folder on the cache's disk for what it must write to do so.
    """
    if not _is_usable(target, module):
        with exclusive(target.name):
            if not _is_usable(target, module):
                facts = {
                    "name": name,
                    "methods": sorted({_method_name(entry) for entry in replaced.values()}),
                }
                build_folder(
                    target, facts, lambda folder: _write(folder, name, module, replaced, open_original)
                )
    return FileWeights.of_safetensors([target / FILE])


def _is_usable(target: Path, module: nn.Module) -> bool:
    """Whether the folder is intact and holds this module: its code (transformers', remote) is in no folder's name."""
    if not is_intact(target):
        return False
    found = {name: (shape, dtype) for name, (_, dtype, shape) in tensors_of(target / FILE).items()}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}
    return found == wanted


def _method_name(entry: Replaced) -> str:
    return "embedding" if entry.method is None else entry.method.key


def _write(
    folder: Path, name: str, module: nn.Module, replaced: Mapping[str, Replaced], open_original: OpenOriginal
) -> None:
    wanted = dict(module.state_dict())
    needed, free = sum(tensor.nbytes for tensor in wanted.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"quantizing {name} writes {needed / 1e9:.2f} GB to {cache_root()}, where {free / 1e9:.2f} GB are free"
        )
    say(f"Quantizing {name}; this happens once …")
    with open_original(folder) as original:
        write_safetensors(folder / FILE, wanted, _quantized(wanted, replaced, original))


def _quantized(
    wanted: Mapping[str, Tensor], replaced: Mapping[str, Replaced], original: FileWeights
) -> Iterator[tuple[str, Tensor]]:
    """Every wanted tensor once, layer by layer; `original` is let go of in between."""
    made: dict[str, Tensor] = {}
    for name in track(wanted, description="Quantizing", transient=True, disable=not _is_terminal()):
        layer, _, last = name.rpartition(".")
        if layer in replaced and last != "bias":
            if name not in made:
                entry = replaced[layer]
                tensors = adopted(entry, original) or entry.quantize(original.as_stored(entry.weight_name))
                made = {f"{layer}.{key}": tensor for key, tensor in tensors.items()}
            yield name, made[name]
        else:
            yield name, original[name]
        original.release()


def _is_terminal() -> bool:
    import sys

    return sys.stderr.isatty()


def write_safetensors(
    file: Path, shapes: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file while its tensors are being made.

    shapes: a tensor of the right shape and type, which may be on meta, for every name in the file's order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in shapes.items():
        start, end = end, end + like.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begins at a multiple of 64 bytes, whatever reads it
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, like), (made, tensor) in zip(shapes.items(), tensors, strict=True):
            assert made == name, (made, name)
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), (
                name,
                tensor.shape,
                tensor.dtype,
            )
            if tensor.numel():
                raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
                stream.write(memoryview(raw))
