"""Linear layers whose weights and activations are 8-bit integers, summed exactly.

    y[i, o] = a[i] * (s[o] / 127) * sum_k q[i, k] * w[o, k] + b[o],   a[i] = max_k |x[i, k]|,
    q[i, k] = round(x[i, k] * (127 / a[i]))

that is symmetric quantization, per row of x ("dynamic, per token") and per output channel of the weight, as in
ZeroQuant (Yao et al. 2022). Every step is either exact (maxima, sums of integers) or one IEEE operation per element,
so that a row's result depends neither on the other rows nor on how the work is divided, to the last bit.

Three products for different machines; which of them one has is for the caller to find out. Knows tensors only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127
_SMALLEST = 1e-30  # a row's largest magnitude counts as at least this, so that its reciprocal is finite
_ROUNDING = 1.5 * 2**23  # added to a small float32 leaves it rounded to nearest even, in the lowest bits
_ZERO = torch.zeros(
    1, dtype=torch.int32
)  # oneDNN takes one zero point for all channels, in less time than many
_LEVELS = torch.tensor(float(LEVELS))  # a number on the left of a division makes torch do it in two steps
_EXACT = 1024  # 1024 * 127 * 127 < 2**24: so many products of two int8 add up exactly in float32


@dataclass(frozen=True, slots=True)
class Product:
    """A way to multiply rows of 8-bit integers with a weight."""

    zero_point: int
    """What stands for 0 in the rows: 128 for uint8, 0 for int8."""
    lay_out: Callable[[Tensor], Tensor]
    """The weight [n, k] int8 in the form that `__call__` reads."""
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(q [r, k], the weight, factor [n] float32) -> [r, n] float32: ((q - zero_point) wᵀ) * factor; r > 0."""


def quantize_rows(x: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
    """x: [r, k] float16, bfloat16 or float32. ([r, k] uint8 or int8, [r, 1] float32: what 127 stands for).

    The second is NaN for a row with an infinity or a NaN, whose integers mean nothing.
    """
    largest = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).float()
    largest.clamp_min_(_SMALLEST)
    shifted = torch.mul(x, torch.div(_LEVELS, largest)).add_(_ROUNDING + zero_point).view(torch.int32)
    return shifted.to(torch.uint8 if zero_point else torch.int8), largest.fmod_(torch.inf)


def int8_linear(x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """x: [..., k]; weight: from `product.lay_out`; factor: [n] float32, the scales of the output channels / 127.

    [..., n] in x's dtype.
    """
    shape = (*x.shape[:-1], factor.shape[0])
    if not x.numel():
        return x.new_empty(shape)
    q, largest = quantize_rows(x.reshape(-1, x.shape[-1]), product.zero_point)
    y = product.multiply(q, weight, factor).mul_(largest)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).view(shape)


def reference(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same by the formula, in float64; for finite x. qweight: [n, k] int8, scale: [n]."""
    largest = x.double().abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
    q = (x.double() * (LEVELS / largest)).round()
    y = q @ qweight.double().T * (largest / LEVELS) * scale.double()
    return y if bias is None else y + bias.double()


def _onednn(q: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 128, weight, factor, _ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _int_mm(q: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    rows, padded_width = q.shape[0], weight.shape[1]
    q = torch.nn.functional.pad(q, (0, padded_width - q.shape[1], 0, max(0, 17 - rows)))
    return torch._int_mm(q, weight.T)[:rows, : factor.shape[0]] * factor


def _padded(weight: Tensor) -> Tensor:
    outputs, width = weight.shape
    return torch.nn.functional.pad(weight, (0, -width % 8, 0, -outputs % 8))


def _chunked(q: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    sums = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _EXACT):
        stop = start + _EXACT
        sums += (q[:, start:stop].float() @ weight[:, start:stop].float().T).to(torch.int32)
    return sums * factor


ONEDNN = Product(128, lambda weight: torch.ops.onednn.qlinear_prepack(weight, None), _onednn)
"""For a CPU with 8-bit dot products (AVX512 VNNI, AMX, …). uint8 because int8 rows meet a slow path in it."""
INT_MM = Product(0, _padded, _int_mm)
"""For CUDA, which wants more than 16 rows and multiples of 8."""
CHUNKED = Product(0, lambda weight: weight, _chunked)
"""For any device: float32 in pieces that it adds up exactly. Slow."""
