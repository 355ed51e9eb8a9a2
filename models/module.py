"""From a checkpoint to a module with its weights: as they are stored, or quantized on the way.

Knows nothing of tokenizers or engines.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cadenza.models.allocator import large_blocks_apart
from cadenza.models.checkpoint import Checkpoint
from cadenza.models.errors import ModelError, one_line
from cadenza.models.install import install, slots
from cadenza.models.memory import require_memory
from cadenza.models.offload.budget import Limits
from cadenza.models.offload.dispatch import dispatch
from cadenza.models.offload.placement import place
from cadenza.models.offload.scratch import Scratch
from cadenza.models.prequantized.base import Format
from cadenza.models.prequantized.checkpoint import weights_for, write_floats
from cadenza.models.progress import progress_bars_on_terminals_only
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.store import store_folder, stored_weights
from cadenza.models.quantization.swap import quantize_modules
from cadenza.models.skeleton import empty_module, hollow_module, open_skeleton, require_all_tensors
from cadenza.models.weights import FileWeights

_SMALLER = "--quantization int8 makes them smaller"
_ON_DISK = "--max-memory leaves those that have no room on disk"


@dataclass(frozen=True)
class ModuleSource:
    """What is known of a model before its weights are read."""

    name: str
    """As the user calls it."""
    folder: Path
    checkpoint: Checkpoint
    model_class: Any
    config: Any
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool
    limits: Limits | None = None
    """What the model may take; None: whatever it needs."""
    stored_format: Format | None = None
    """What the weights were quantized by; None: they are floats."""


def load_module(source: ModuleSource, method: Method | None) -> Any:
    """The transformers module, on its device. Raises `ModelError`."""
    with large_blocks_apart():
        return _load(source, method)


def _load(source: ModuleSource, method: Method | None) -> Any:
    if source.limits is not None:
        return _load_offloaded(source, source.limits, method)
    if method is not None:
        return _load_quantized(source, method)
    if source.stored_format is not None:
        return _load_dequantized(source)
    _require_memory(
        source.checkpoint.loaded_bytes(source.dtype.itemsize), source, f"{_SMALLER}, or {_ON_DISK}"
    )
    module = _load_whole(source)
    with _memory_errors(source):
        return module.to(source.device)


def _require_memory(needed: int, source: ModuleSource, advice: str) -> None:
    try:
        require_memory(needed, source.device, source.name)
    except ModelError as error:
        raise ModelError(f"{error}; {advice}") from None


def num_parameters(model_class: Any, config: Any) -> int:
    return sum(parameter.numel() for parameter in empty_module(model_class, config).parameters())


def _load_whole(source: ModuleSource) -> Any:
    try:
        with progress_bars_on_terminals_only():
            module, report = source.model_class.from_pretrained(
                str(source.folder),
                config=source.config,
                dtype=source.dtype,
                local_files_only=True,
                use_safetensors=not source.checkpoint.is_pickle,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the weights in {source.folder} cannot be loaded: {one_line(error)}") from error
    require_all_tensors(report, source.folder)
    return module.eval().requires_grad_(False)


def _load_dequantized(source: ModuleSource) -> Any:
    module = hollow_module(source.model_class, source.config, source.dtype)
    needed = sum(tensor.nbytes for tensor in module.state_dict().values())
    _require_memory(needed, source, f"{_SMALLER}, or {_ON_DISK}")
    assert source.stored_format is not None
    weights = weights_for(module, source.checkpoint, source.stored_format)
    if weights is not None:  # nothing is written
        return _installed(source, module, weights)
    scratch = Scratch(None)
    try:
        return _installed(source, *_skeleton(source, scratch.path))
    finally:
        scratch.remove()


def _installed(source: ModuleSource, module: Any, weights: FileWeights) -> Any:
    with _memory_errors(source):
        install(slots(module), weights, source.device)
        return module.to(source.device)


def _load_quantized(source: ModuleSource, method: Method) -> Any:
    module = hollow_module(source.model_class, source.config, source.dtype)
    replaced = quantize_modules(module, method, source.dtype)
    _require_memory(sum(tensor.nbytes for tensor in module.state_dict().values()), source, _ON_DISK)
    target = store_folder(source.folder, source.checkpoint, method, source.dtype)
    weights = stored_weights(target, source.name, module, replaced, partial(_original, source))
    return _installed(source, module, weights)


def _load_offloaded(source: ModuleSource, limits: Limits, method: Method | None) -> Any:
    """The module with what has room on the device, and streams for the rest; its `placement` says which is where."""
    module = hollow_module(source.model_class, source.config, source.dtype)
    replaced = {} if method is None else quantize_modules(module, method, source.dtype)
    text_config = source.config.get_text_config(decoder=True)
    placement = place(module, text_config, source.device, source.dtype, limits, source.name)
    require_memory(placement.resident_bytes, source.device, source.name)
    scratch = Scratch(limits.folder)
    try:
        if method is None:
            module, weights = _skeleton(source, scratch.path)
        else:
            target = store_folder(source.folder, source.checkpoint, method, source.dtype)
            weights = stored_weights(
                target,
                source.name,
                module,
                replaced,
                lambda _: _original(source, scratch.path),
            )
        with _memory_errors(source):
            dispatch(module, weights, source.device, placement)
    except BaseException:
        scratch.remove()
        raise
    scratch.keep_for(module)
    module.placement = placement
    return module


@contextlib.contextmanager
def _original(source: ModuleSource, parent: Path) -> Iterator[FileWeights]:
    """The checkpoint's tensors, one by one, for as long as the block lasts; scratch files go below `parent`."""
    with tempfile.TemporaryDirectory(prefix="cadenza-", dir=parent) as scratch:
        yield _skeleton(source, Path(scratch))[1]


def _skeleton(source: ModuleSource, scratch: Path) -> tuple[Any, FileWeights]:
    if source.stored_format is not None:
        module = hollow_module(source.model_class, source.config, source.dtype)
        weights = weights_for(module, source.checkpoint, source.stored_format)
        if weights is not None:
            return module, weights
        floats = scratch / "floats"
        written = write_floats(source.folder, source.checkpoint, source.stored_format, floats)
        source = replace(source, folder=floats, checkpoint=written, stored_format=None)
    return open_skeleton(
        source.model_class,
        source.folder,
        source.config,
        source.dtype,
        scratch,
        is_pickle=source.checkpoint.is_pickle,
    )


@contextlib.contextmanager
def _memory_errors(source: ModuleSource) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{source.name} does not fit: {source.device} ran out of memory") from error
