"""From the names that users have for quantization methods to the methods."""

from typing import get_args

import torch

from cadenza.models.errors import ModelError
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.names import Quantization


def method_named(name: Quantization, group_size: int, device: torch.device) -> Method | None:
    """None for "none". Raises `ModelError` for a method that cannot run here, saying what it lacks.

    group_size: weights that share a scale, for methods that have groups. device: what is to compute, since layouts
    are made for it.
    """
    if name == "none":
        return None
    if name == "int8":
        from cadenza.models.quantization.int8 import Int8

        return Int8()
    if name == "int4":
        from cadenza.models.quantization.int4 import Int4, layout_for

        return Int4(group_size, layout_for(device))
    if name == "fp8":
        from cadenza.models.quantization.fp8 import Fp8

        return Fp8()
    if name == "llm-int8":
        from cadenza.models.quantization.llm_int8 import LLMInt8

        return LLMInt8()
    if name == "nf4":
        from cadenza.models.quantization.nf4 import NF4

        return NF4()
    raise ModelError(f"quantization {name!r} is not one of {', '.join(get_args(Quantization))}")
