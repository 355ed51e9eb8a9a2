"""The quantization methods by the names of the command line; free of torch, for its parser."""

from typing import Literal

Quantization = Literal["none", "int8", "int4", "nf4", "fp8", "llm-int8"]
GROUP_SIZES = (32, 64, 128)
