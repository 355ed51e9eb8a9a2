"""fp8: float8_e4m3fn weights with a scale per output channel.

On a GPU that has them, rows are rounded to float8, too, as they come. No CPU multiplies such numbers: there weights
become float32 a few rows at a time, which saves memory and no time. Knows nothing of files or models.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.kernels.fp8_linear import FP8, LARGEST, can_scale_rows, fp8_linear, fp8_values
from cadenza.models.linear import PackedLinear
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.int8 import Int8

_AT_ONCE = 2**20  # weights in float32; with fewer, oneDNN's 0.3 ms of preparation for each block shows


class Fp8(Method):
    @property
    def key(self) -> str:
        return "fp8-1"

    @property
    def head(self) -> Method:
        return Int8()

    def can_quantize(self, out_features: int, in_features: int) -> bool:
        return True

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """qweight [out, in] float8_e4m3fn, scale [out] float32: each row's largest weight becomes 448."""
        weight = weight.float()
        scale = weight.abs().amax(1).div_(LARGEST)
        quotient = weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        return {"qweight": quotient.clamp_(-LARGEST, LARGEST).to(FP8), "scale": scale}

    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        return Fp8Linear(in_features, out_features, has_bias=has_bias, dtype=dtype)


class Fp8Linear(QuantizedLinear):
    qweight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, has_bias=has_bias, dtype=dtype)
        self.register_buffer("qweight", torch.empty(out_features, in_features, dtype=FP8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device="meta"))

    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        return fp8_values(self.qweight[start:stop]) * self.scale[start:stop, None]

    def lay_out(self) -> None:
        pass

    def apply_prepared(self, x: Tensor) -> Tensor:
        if self.qweight.device.type == "cpu":
            y = self._apply_packed(x.float()).to(x.dtype)
        elif can_scale_rows(self.qweight.device, self.out_features, self.in_features):
            rows = x.reshape(-1, self.in_features)
            y = fp8_linear(rows, self.qweight, self.scale).to(x.dtype).view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.dequantized().to(x.dtype))
        return y if self.bias is None else y + self.bias

    def _apply_packed(self, x: Tensor) -> Tensor:
        """Packed for every product anew, because a packed weight sums in one order for any number of rows."""
        step = max(64, _AT_ONCE // self.in_features // 64 * 64)
        parts = [PackedLinear(fp8_values(part), None)(x) for part in self.qweight.split(step)]
        return torch.cat(parts, dim=-1).mul_(self.scale)

    @property
    def operator(self) -> str:
        if self.qweight.device.type == "cpu":
            return "oneDNN float32, packed from fp8 for every product"
        is_scaled = can_scale_rows(self.qweight.device, self.out_features, self.in_features)
        return "torch fp8, 8-bit activations" if is_scaled else super().operator
