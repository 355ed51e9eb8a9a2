"""LLM.int8 (Dettmers et al. 2022), token by token: large activations keep their precision, the rest is int8.

The paper and bitsandbytes choose outlier columns over the whole batch, so that one request's tokens would depend on
its neighbours. Here each token has its own: elements of magnitude 6 and more. Their product with the 8-bit weights is
two more products of 8-bit integers, a coarse and a fine one, which make up 15 bits (float16, as bitsandbytes uses it,
has 11); sums of integers are exact, so that a row's result depends on no other. A token without outliers costs one
product of 8-bit integers, one with outliers three. Weights are as bitsandbytes stores them: rounded to nearest, by row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cadenza.kernels.int8_linear import LEVELS, int8_linear, quantize_rows
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.int8 import MOST_SUMMED, ChannelwiseLinear, Int8, quantize_channels

THRESHOLD = 6.0


class LLMInt8(Method):
    @property
    def key(self) -> str:
        return "llm-int8-1"

    @property
    def head(self) -> Method:
        return Int8()

    def can_quantize(self, out_features: int, in_features: int) -> bool:
        return in_features <= MOST_SUMMED

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """qweight [out, in] int8, scale [out] float32: what 1 stands for."""
        return quantize_channels(weight)

    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        return LLMInt8Linear(in_features, out_features, has_bias=has_bias, dtype=dtype)


class LLMInt8Linear(ChannelwiseLinear):
    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.as_stored(start, stop)

    def apply_prepared(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        is_outlier = rows.abs() >= THRESHOLD
        y = self._multiply(rows.masked_fill(is_outlier, 0.0))
        places = is_outlier.any(1).nonzero().flatten()
        if len(places):
            outliers = rows[places].masked_fill(~is_outlier[places], 0.0)
            integers, largest = quantize_rows(outliers, 0)
            rest = outliers - integers.float() * (largest / LEVELS)
            coarse, fine = self._multiply(torch.cat((outliers, rest))).chunk(2)
            y[places] += coarse + fine
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        """[r, in] → [r, out] float32, both sides of the product in 8 bits."""
        return int8_linear(rows, self._laid_out, self._factor, None, self._product)

    @property
    def operator(self) -> str:
        return "8-bit products, outliers of each token in 15 bits"
