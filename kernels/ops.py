"""Which implementation computes on a device: Triton's kernels on a GPU, plain torch elsewhere."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

SWITCH = "CADENZA_KERNELS"
"""Environment variable: "torch" has plain torch compute on GPUs too, to compare with, or where Triton cannot run."""


def runs_triton(device: torch.device) -> bool:
    """Whether kernels on this device are Triton's. Tests make it true for a CPU, in Triton's interpreter."""
    return device.type == "cuda" and _wants_triton()


def is_interpreted(x: Tensor) -> bool:
    """Kernels meet tensors of a CPU only in Triton's interpreter."""
    return x.device.type == "cpu"


@cache
def _wants_triton() -> bool:
    wanted = os.environ.get(SWITCH, "triton")
    if wanted not in ("triton", "torch"):
        raise ValueError(f"{SWITCH} is {wanted!r}; it may be triton or torch")
    return wanted == "triton" and importlib.util.find_spec("triton") is not None
