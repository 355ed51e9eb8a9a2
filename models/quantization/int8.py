"""int8: a scale per output channel, activations rounded to 8 bits per token as they come (W8A8, dynamic).

Both are rotated first, so that outliers do not take the levels away from the rest; see `rotation`. Integers are summed
exactly, so that a row's result cannot depend on the rows beside it.

On a GPU with Triton activations stay in the model's dtype, however many rows there are: rounding them for large steps
only would make an answer depend on what else is computed. Up to 64 rows `int8_matmul` reads the weight once; for more
the weight is dequantized for cuBLAS, which makes a difference in the last bits.
"""

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.kernels import ops
from cadenza.kernels.int8_linear import CHUNKED, INT_MM, LEVELS, ONEDNN, Product, int8_linear
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.rotation import block_size, restore_weight, rotate, rotate_weight

MOST_SUMMED = 2**16  # products of a uint8 and an int8 that 32 bits hold
_FLOATS_AT_ONCE = 2**26  # weights that are dequantized together on a GPU
_AT_ONCE = 2**18  # elements that are quantized or dequantized together: they stay in a core's cache


@functools.cache
def product_for(device: torch.device) -> Product:
    """The fastest product that is exact on this machine, by a trial with the largest numbers there are."""
    for product in (ONEDNN if device.type == "cpu" else INT_MM,):
        if _is_exact(product, device):
            return product
    return CHUNKED


def _is_exact(product: Product, device: torch.device) -> bool:
    """Instructions without VNNI add pairs of products in 16 bits, which overflow."""
    x = torch.full((3, 320), 1.0, device=device)
    x[1] = torch.linspace(-1.0, 1.0, 320)
    x[2] = -1.0
    weight = torch.full((40, 320), LEVELS, dtype=torch.int8, device=device)
    weight[1::2] *= -1
    scale = torch.ones(40, device=device)
    try:
        y = int8_linear(x, product.lay_out(weight), scale / LEVELS, None, product)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected = int8_linear(x, CHUNKED.lay_out(weight), scale / LEVELS, None, CHUNKED)
    return torch.equal(y, expected)


def quantize_channels(weight: Tensor, *, is_rotated: bool = False) -> dict[str, Tensor]:
    """weight: [out, in]. qweight [out, in] int8 within ±127, scale [out] float32; symmetric, round to nearest.

    is_rotated: of the rotated weight. Takes little more memory than the weight and the result.
    """
    qweight, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    step = max(1, _AT_ONCE // weight.shape[1])
    for part, integers, scales in zip(
        weight.split(step), qweight.split(step), scale.split(step), strict=True
    ):
        rows = rotate_weight(part) if is_rotated else part.float()
        torch.div(rows.abs().amax(1), LEVELS, out=scales)
        quotient = rows / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        integers.copy_(quotient.round_().clamp_(-LEVELS, LEVELS))
    return {"qweight": qweight, "scale": scale}


class Int8(Method):
    @property
    def key(self) -> str:
        return "int8-rotated-1"

    @property
    def head(self) -> Method:
        return self

    def can_quantize(self, out_features: int, in_features: int) -> bool:
        return in_features <= MOST_SUMMED

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """As `quantize_channels`, of the rotated weight."""
        return quantize_channels(weight, is_rotated=True)

    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        return Int8Linear(in_features, out_features, has_bias=has_bias, dtype=dtype)


class ChannelwiseLinear(QuantizedLinear):
    """Holds what `quantize_channels` gives, laid out for the product of this machine."""

    qweight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, has_bias=has_bias, dtype=dtype)
        self.register_buffer(
            "qweight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        )
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device="meta"))

    def as_stored(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[stop - start, in_features] float32: rows of the matrix that was quantized, rotated or not."""
        return self.qweight[start:stop].float() * self.scale[start:stop, None]

    def lay_out(self) -> None:
        self._product = product_for(self.qweight.device)
        self._laid_out = self._product.lay_out(self.qweight)
        self._factor = self.scale / LEVELS
        del self.qweight, self.scale


class Int8Linear(ChannelwiseLinear):
    _scale: Tensor | None = None
    """What `int8_matmul` takes, where it runs."""

    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        return restore_weight(self.as_stored(start, stop))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_prepared:
            return self.apply_prepared(x)
        rotated, step = rotate(x), max(1, _AT_ONCE // self.in_features)  # cheaper than to restore the weight
        starts = range(0, self.out_features, step)
        y = torch.cat([F.linear(rotated, self.as_stored(at, at + step)) for at in starts], dim=-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def lay_out(self) -> None:
        if not ops.runs_triton(self.qweight.device):
            super().lay_out()
            return
        self._scale, self._laid_out = self.scale / _room(self.in_features), self.qweight
        del self.qweight, self.scale

    def apply_prepared(self, x: Tensor) -> Tensor:
        if self._scale is not None:
            rows = _rotate_in_triton(x.reshape(-1, self.in_features))
            return self._apply_in_triton(rows, self._scale).view(*x.shape[:-1], self.out_features)
        y = int8_linear(rotate(x), self._laid_out, self._factor, self.bias, self._product)
        return y.to(x.dtype)

    def _apply_in_triton(self, rows: Tensor, scale: Tensor) -> Tensor:
        """rows: [r, in_features], rotated; [r, out_features] of their dtype."""
        from cadenza.kernels.few_rows import MOST_ROWS
        from cadenza.kernels.int8_matmul import int8_matmul

        if len(rows) <= MOST_ROWS:
            return int8_matmul(rows, self._laid_out, scale, self.bias)
        parts = []
        step = max(64, _FLOATS_AT_ONCE // self.in_features)
        for start in range(0, self.out_features, step):
            own = slice(start, start + step)
            weight = (self._laid_out[own] * scale[own, None]).to(rows.dtype)
            parts.append(F.linear(rows, weight, None if self.bias is None else self.bias[own]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def operator(self) -> str:
        if self._scale is not None:
            return "Triton int8 up to 64 rows; torch, dequantized, above"
        names = {
            id(ONEDNN): "oneDNN int8",
            id(INT_MM): "torch int8",
            id(CHUNKED): "float32 products of 8-bit integers",
        }
        return f"{names[id(self._product)]}, 8-bit activations"


def _rotate_in_triton(rows: Tensor) -> Tensor:
    """[r, k] → [r, k] in the rows' dtype: `rotate` without its growth, rounded once."""
    from cadenza.kernels.hadamard import SIZES, rotate_blocks

    width = rows.shape[1]
    if block_size(width) in SIZES:
        return rotate_blocks(rows.contiguous(), block_size(width), _room(width))
    return (rotate(rows) * _room(width)).to(rows.dtype)


def _room(width: int) -> float:
    """About what takes from `rotate` its growth, so that float16 has room: a power of 2, with which nothing rounds."""
    return 2.0 ** -(block_size(width).bit_length() // 2)
