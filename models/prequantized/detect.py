"""From the configuration of a checkpoint to the format that its weights are in.

Knows no tensors.
"""

from collections.abc import Mapping
from typing import Any

from cadenza.models.errors import ModelError, one_line
from cadenza.models.prequantized.base import Format

LEFT_TO_TRANSFORMERS = ("mxfp4",)
"""Methods whose weights transformers itself makes floats of wherever it runs."""


def taken_format(config: Any) -> Format | None:
    """The format, which is taken out of the configuration, so that transformers sees a float model.

    config: a transformers configuration, changed in place. None: the weights are floats, or left to transformers' own
    quantizers. Raises `ModelError` for what neither can read: weights without their scales would load, and answer
    nonsense.
    """
    parts = [config]
    if (text_config := config.get_text_config(decoder=True)) is not config:
        parts.append(text_config)
    found = [getattr(part, "quantization_config", None) for part in parts]
    described = [one if isinstance(one, Mapping) else one.to_dict() for one in found if one is not None]
    if not described:
        return None
    method = _method(described[0])
    if method in LEFT_TO_TRANSFORMERS:
        for part in parts:
            if isinstance(own := getattr(part, "quantization_config", None), dict):
                own["dequantize"] = True
        return None
    try:
        stored_format = _reader(method, described[0])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the model's quantization_config ({method}) is damaged: {one_line(error)}"
        ) from error
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return stored_format


def _method(described: Mapping[str, Any]) -> str:
    if described.get("load_in_8bit") or described.get("load_in_4bit"):
        return "bitsandbytes"
    return str(described.get("quant_method"))


def _reader(method: str, described: Mapping[str, Any]) -> Format:
    if method in ("gptq", "awq"):
        from cadenza.models.prequantized import gptq

        return gptq.gptq(described) if method == "gptq" else gptq.awq(described)
    if method == "bitsandbytes":
        from cadenza.models.prequantized.bitsandbytes import bitsandbytes

        return bitsandbytes(described)
    if method in ("compressed-tensors", "compressed_tensors"):
        from cadenza.models.prequantized.compressed_tensors import compressed_tensors

        return compressed_tensors(described)
    if method in ("fp8", "fbgemm_fp8"):
        from cadenza.models.prequantized.fp8 import fp8

        return fp8(described)
    if method == "torchao":
        from cadenza.models.prequantized.torchao import torchao

        return torchao(described)
    known = "gptq, awq, bitsandbytes, compressed-tensors, torchao, fp8, fbgemm_fp8 and mxfp4"
    raise ModelError(
        f"the model's weights are quantized by {method!r}, which cannot be read here; {known} can"
    )
