"""Which implementation computes on a device: Triton's kernels on a GPU, plain torch elsewhere."""

import functools
import importlib.util

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether kernels on this device are Triton's. Tests make it true for a CPU, in Triton's interpreter."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
