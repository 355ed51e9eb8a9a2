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

_SAME = {
    "int8": ("int8",),
    "int4": ("GPTQ 4-bit", "AWQ 4-bit", "int4"),
    "nf4": ("nf4",),
    "fp8": ("fp8", "float8"),
}
"""Words of a format's label that mean a method of ours."""


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


def announce(name: str, stored_format: Format, quantization: str, dtype: torch.dtype) -> None:
    """Say in the log what becomes of the weights."""
    float_name = str(dtype).removeprefix("torch.")
    if quantization == "none":
        hint = f"; --quantization {better} keeps them small" if (better := _kind(stored_format)) else ""
        log.info("%s: %s weights are dequantized to %s%s", name, stored_format.label, float_name, hint)
    elif quantization == _kind(stored_format):
        log.info("%s: %s weights are stored as %s", name, stored_format.label, quantization)
    else:
        log.warning(
            "%s: %s weights are quantized again, as %s; what both lose adds up",
            name,
            stored_format.label,
            quantization,
        )


def _kind(stored_format: Format) -> str | None:
    """The method of ours that stores weights as the format does."""
    return next(
        (name for name, words in _SAME.items() if any(word in stored_format.label for word in words)), None
    )


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
