"""A quantized checkpoint as if it were a float one, for all that loads models.

Its weights are dequantized one by one as they are asked for. Where transformers would rename or fuse the
checkpoint's tensors, as in mixtures of experts, they are first written to a folder as float32, for it to read.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadenza.models.checkpoint import Checkpoint, open_checkpoint
from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format
from cadenza.models.prequantized.weights import DequantizedWeights, fitting, open_weights

log = logging.getLogger(__name__)

_KINDS = {
    "int4": ("GPTQ 4-bit", "AWQ 4-bit", "compressed-tensors int4"),
    "llm-int8": ("bitsandbytes int8",),
    "int8": ("compressed-tensors int8", "GPTQ 8-bit"),
    "nf4": ("bitsandbytes nf4",),
    "fp8": ("fp8", "compressed-tensors float8"),
}
"""Formats that are as small as a method of ours makes weights."""
_KEPT = ("int4", "llm-int8", "nf4")
"""Methods that keep the numbers of their kind: `adopt` sees to it, or rounding finds the same ones."""


def weights_for(module: Any, checkpoint: Checkpoint, stored_format: Format) -> DequantizedWeights | None:
    """The module's tensors by its names; None where the checkpoint has other names, and must be written out."""
    _require_safetensors(checkpoint, stored_format)
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    weights = open_weights(checkpoint.files, stored_format, dtypes)
    return weights if fitting(weights, module) else None


def write_floats(folder: Path, checkpoint: Checkpoint, stored_format: Format, target: Path) -> Checkpoint:
    """Write the model in `folder` to `target` without its quantization, tensor by tensor; what was written."""
    from cadenza.models.quantization.store import write_safetensors

    _require_safetensors(checkpoint, stored_format)
    weights = open_weights(checkpoint.files, stored_format, {})
    names = [name for name in weights if name.rpartition(".")[2] not in stored_format.ignored]
    shapes = {name: _empty(weights, name) for name in names}
    target.mkdir(parents=True, exist_ok=True)
    configuration = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(_without_quantization(configuration)), encoding="utf-8")
    try:
        write_safetensors(target / "model.safetensors", shapes, ((name, weights[name]) for name in names))
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in shapes.values())
        raise ModelError(
            f"cannot write {needed / 1e9:.2f} GB of floats to {target}: {error.strerror}"
        ) from error
    return open_checkpoint(target, allow_pickle=False)


def announce(
    name: str, stored_format: Format, quantization: str, group_size: int, dtype: torch.dtype
) -> None:
    """Say in the log what becomes of the weights. quantization, group_size: what was asked for."""
    float_name = str(dtype).removeprefix("torch.")
    kind = next((kind for kind, labels in _KINDS.items() if stored_format.label in labels), None)
    if quantization == "none":
        hint = "" if kind is None else f"; --quantization {kind} keeps them in {stored_format.bits} bits"
        log.info("%s: %s weights are dequantized to %s%s", name, stored_format.label, float_name, hint)
    elif quantization == kind and kind in _KEPT and _has_groups(stored_format, quantization, group_size):
        log.info("%s: %s weights are kept in %d bits", name, stored_format.label, stored_format.bits)
    else:
        line = "%s: %s weights are quantized again, as %s: what is lost adds up"
        log.warning(line, name, stored_format.label, quantization)


def _has_groups(stored_format: Format, quantization: str, group_size: int) -> bool:
    """Whether groups of the size that was asked for share a scale in the checkpoint, too."""
    if quantization != "int4":
        return True
    return not stored_format.is_reordered and (stored_format.group_size or 0) % group_size == 0


def _require_safetensors(checkpoint: Checkpoint, stored_format: Format) -> None:
    if checkpoint.is_pickle:
        raise ModelError(f"{stored_format.label} weights are read from safetensors only, not from pickles")


def _empty(weights: DequantizedWeights, name: str) -> Tensor:
    dtype = torch.float32 if weights.is_quantized(name) else weights.as_stored(name).dtype
    return torch.empty(weights.shape(name), dtype=dtype, device="meta")


def _without_quantization(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if key == "text_config" else value
        for key, value in configuration.items()
        if key != "quantization_config"
    }
