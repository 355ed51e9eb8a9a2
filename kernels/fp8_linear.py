"""Products with weights in float8_e4m3fn (Micikevicius et al. 2022, "FP8 formats for deep learning").

Knows nothing of modules or files.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
_FLOAT16_FACTOR = 256.0
_SMALLEST_SCALE = 2.0**-100


def fp8_values(q: Tensor) -> Tensor:
    """float32, the same values as `q.float()` in a fifteenth of its time (torch converts them one by one on a CPU).

    As float16, a number's bits mean a 256th of it, smallest ones included. NaN, which no weight is, becomes 480.
    """
    bits = q.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(_FLOAT16_FACTOR)


def can_scale_rows(device: torch.device, out_features: int, in_features: int) -> bool:
    """Whether `fp8_linear` runs on a GPU for a weight of this shape: from compute capability 8.9 on."""
    if device.type != "cuda" or out_features % 16 or in_features % 16:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """[r, out_features] bfloat16: rows of x [r, in_features] are rounded to float8, with a scale each, and multiplied.

    q: [out_features, in_features] float8; scale: [out_features] float32.
    """
    row_scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(_SMALLEST_SCALE)
    rows = (x.float() / row_scale).clamp(-LARGEST, LARGEST).to(FP8)
    return torch._scaled_mm(rows, q.t(), row_scale, scale[None], out_dtype=torch.bfloat16)
