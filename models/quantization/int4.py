"""int4: 4-bit integers with a scale and a zero for each group of weights along the input.

On a CPU torch's packed operator computes, with activations in bfloat16. On a GPU with Triton `int4_matmul` computes up
to 64 rows with the weight itself; for more, and elsewhere, the weight is dequantized for every product, which saves
memory and no time. So there a token's last bits depend on whether its step has more than 64 rows, as they do with
cuBLAS's products of floats on how many. Knows nothing of files or models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.kernels import int4_words, ops
from cadenza.kernels.int4_linear import LAYOUTS, ROWS, Layout, cpu_layout, int4_linear
from cadenza.models.errors import ModelError
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.groups import quantize_groups
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.names import GROUP_SIZES

_AT_ONCE = 2**24
"""Weights that are laid out anew together."""
_DEQUANTIZED_AT_ONCE = 2**27
"""Weights that are dequantized together on a GPU: 256 MB in 16 bit."""


@dataclass(frozen=True)
class Int4(Method):
    """Raises `ModelError` for a group size that no operator has."""

    group_size: int
    layout: Layout
    """Of the packed integers; see `layout_for`."""

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ModelError(
                f"quantization_group_size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}"
            )

    @property
    def key(self) -> str:
        return f"int4-2-{self.group_size}-{self.layout.name}"

    @property
    def head(self) -> Method:
        return Int8()

    def can_quantize(self, out_features: int, in_features: int) -> bool:
        return True

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """qweight [rows, columns / 2] uint8, scales_and_zeros [groups, rows, 2] bfloat16, as `Int4Linear` has them."""
        out_features, in_features = weight.shape
        padding = (0, -in_features % min(GROUP_SIZES), 0, -out_features % ROWS)
        weight = F.pad(weight, padding) if any(padding) else weight
        integers, scales, zeros = quantize_groups(weight, group_size_for(in_features, self.group_size))
        return {
            "qweight": self.layout.pack(integers),
            "scales_and_zeros": torch.stack((scales.T, zeros.T), dim=-1),
        }

    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        return Int4Linear(
            in_features,
            out_features,
            group_size_for(in_features, self.group_size),
            self.layout,
            has_bias=has_bias,
            dtype=dtype,
        )


def layout_for(device: torch.device) -> Layout:
    """What the device's operator reads; any will do where there is none."""
    return (cpu_layout() if device.type == "cpu" else None) or LAYOUTS[0]


def group_size_for(in_features: int, wanted: int) -> int:
    """The largest size up to `wanted` that divides `in_features`, which is padded where none does."""
    return next((size for size in (128, 64) if size <= wanted and in_features % size == 0), 32)


class Int4Linear(QuantizedLinear):
    """The weight is padded with zeros: rows to a multiple of 64, columns to one of 32."""

    output_dimensions: ClassVar[Mapping[str, int]] = {"scales_and_zeros": 1}
    qweight: Tensor
    scales_and_zeros: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        layout: Layout,
        *,
        has_bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(in_features, out_features, has_bias=has_bias, dtype=dtype)
        self.group_size, self.layout = group_size, layout
        self._num_padding = -in_features % min(GROUP_SIZES)
        rows, columns = out_features + -out_features % ROWS, in_features + self._num_padding
        qweight = torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta")
        self.register_buffer("qweight", qweight)
        scales = torch.empty(columns // group_size, rows, 2, dtype=torch.bfloat16, device="meta")
        self.register_buffer("scales_and_zeros", scales)
        self._words: Tensor | None = None
        """In place of `qweight`, as `int4_matmul` reads them."""

    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.out_features if stop is None else stop
        rows = slice(start, stop + -stop % ROWS)
        integers = self.layout.unpack(self.qweight[rows]).unflatten(1, (-1, self.group_size))
        scales, zeros = self.scales_and_zeros[:, rows].float().permute(2, 1, 0)[..., None]
        weight: Tensor = ((integers.float() - 8) * scales + zeros).flatten(1)
        return weight[: stop - start, : self.in_features]

    def lay_out(self) -> None:
        if not ops.runs_triton(self.qweight.device):
            return
        num_rows, width = self.qweight.shape[0], self.qweight.shape[1] * 2
        shape = (-(-width // int4_words.CHUNK), num_rows, int4_words.WORDS)
        self._words = torch.empty(shape, dtype=torch.int32, device=self.qweight.device)
        for rows in _pieces(num_rows, width, _AT_ONCE):
            self._words[:, rows] = int4_words.pack(self.layout.unpack(self.qweight[rows]))
        del self.qweight

    def apply_prepared(self, x: Tensor) -> Tensor:
        if self._words is not None:
            return self._apply_words(x, self._words)
        if self.qweight.device.type != "cpu" or cpu_layout() != self.layout:
            return F.linear(x, self.dequantized().to(x.dtype), self.bias)
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()  # the operator refuses others
        if self._num_padding:
            rows = F.pad(rows, (0, self._num_padding))
        y = int4_linear(rows, self.qweight, self.group_size, self.scales_and_zeros)
        y = y[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _apply_words(self, x: Tensor, words: Tensor) -> Tensor:
        from cadenza.kernels.few_rows import MOST_ROWS
        from cadenza.kernels.int4_matmul import dequantize, int4_matmul

        rows = x.reshape(-1, self.in_features)
        if len(rows) <= MOST_ROWS:
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            own = slice(0, self.out_features)
            y = int4_matmul(rows, words[:, own], self.scales_and_zeros[:, own], self.group_size, self.bias)
        else:
            parts = []
            for own in _pieces(self.out_features, self.in_features, _DEQUANTIZED_AT_ONCE):
                pairs = self.scales_and_zeros[:, own]
                weight = dequantize(words[:, own], pairs, self.group_size, self.in_features, x.dtype)
                parts.append(F.linear(rows, weight, None if self.bias is None else self.bias[own]))
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def operator(self) -> str:
        if self._words is not None:
            return f"Triton int4, groups of {self.group_size}, up to 64 rows; torch, dequantized, above"
        is_packed = self.qweight.device.type == "cpu" and cpu_layout() == self.layout
        return (
            f"torch int4, groups of {self.group_size}, bfloat16 activations"
            if is_packed
            else super().operator
        )

    def empty(self, out_features: int, *, has_bias: bool) -> "Int4Linear":
        return Int4Linear(
            self.in_features, out_features, self.group_size, self.layout, has_bias=has_bias, dtype=self.dtype
        )

    @classmethod
    def concatenate(cls, layers: Sequence["Int4Linear"]) -> "Int4Linear | None":
        if any(layer.out_features % ROWS for layer in layers[:-1]):
            return None  # padding would come to lie between the outputs
        return super().concatenate(layers)


def _pieces(num_rows: int, width: int, at_once: int) -> Iterator[slice]:
    """All rows, about so many weights at a time; each piece but the last has a multiple of 64 rows."""
    step = max(ROWS, at_once // width // ROWS * ROWS)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
