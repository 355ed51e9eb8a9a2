"""What a quantization method is, and what the layers that it makes have in common.

A method turns one weight matrix into named tensors, once, and makes layers that compute with them. The tensors go
to a file in between, so that a method knows nothing of checkpoints, files or budgets.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DEQUANTIZED_AT_ONCE = (
    2**18
)  # elements: what stays in a core's cache; larger blocks are fetched from memory twice


class QuantizedLinear(nn.Module, ABC):
    """`y = x Wᵀ + b` with a quantized W; x [..., in_features] and y [..., out_features] in the model's dtype.

    Made empty, its buffers on meta; someone puts the tensors of `Method.quantize` in their place. From then on it
    computes with dequantized weights, slowly and on any device, which is the truth that the fast way is checked
    against. `prepare` lays the weight out for the device's operator and may give up the buffers.

    A row's result must not depend on the other rows, to the last bit.
    """

    output_dimensions: ClassVar[Mapping[str, int]] = {}
    """Along which dimension of a buffer the output features lie, where it is not the first."""

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        bias = torch.empty(out_features, dtype=dtype, device="meta") if has_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.is_prepared = False
        self.is_transposed = False
        """The layer in its place was GPT-2's `Conv1D`, whose weight checkpoints have the other way round."""

    @property
    def weight(self) -> Tensor:
        """The shape and dtype that the weight stands for, for modeling code that asks; it has no data."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    @abstractmethod
    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[stop - start, in_features] float32: these rows of what the layer multiplies with. Not after `prepare`.

        start: a multiple of 64; stop: too, or the end.
        """

    def prepare(self) -> None:
        """From now on compute with the operator of the device that the buffers are on."""
        self.lay_out()
        self.is_prepared = True

    @abstractmethod
    def lay_out(self) -> None:
        """Bring the weight into the form that the operator reads; buffers that it does not read may be deleted."""

    @abstractmethod
    def apply_prepared(self, x: Tensor) -> Tensor:
        """`forward` after `prepare`."""

    @property
    def operator(self) -> str:
        """What multiplies once the layer is prepared, in a few words for a person."""
        return "torch, dequantized for every product"

    def empty(self, out_features: int, *, has_bias: bool) -> Self:
        """A layer like this one, as its `Method` makes it."""
        return type(self)(self.in_features, out_features, has_bias=has_bias, dtype=self.dtype)

    @classmethod
    def concatenate(cls, layers: Sequence[Self]) -> Self | None:
        """One layer, not prepared, that gives the outputs of all layers side by side; None if there is none such."""
        has_bias = any(layer.bias is not None for layer in layers)
        whole = layers[0].empty(sum(layer.out_features for layer in layers), has_bias=has_bias)
        for name in whole._buffers:
            parts = [layer.get_buffer(name) for layer in layers]
            whole._buffers[name] = torch.cat(parts, dim=cls.output_dimensions.get(name, 0))
        if has_bias:
            device = parts[0].device
            biases = [
                torch.zeros(layer.out_features, dtype=layer.dtype, device=device)
                if layer.bias is None
                else layer.bias
                for layer in layers
            ]
            whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        if self.is_prepared:
            return self.apply_prepared(x)
        step = max(64, _DEQUANTIZED_AT_ONCE // self.in_features // 64 * 64)
        parts = [
            F.linear(x, self.dequantized(start, min(start + step, self.out_features)).to(x.dtype))
            for start in range(0, self.out_features, step)
        ]
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Method(ABC):
    """One way to store weight matrices in fewer bits. Instances are immutable."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Tells tensors apart that were made differently: method, parameters, layout, version."""

    @property
    @abstractmethod
    def head(self) -> "Method":
        """The method for the output layer, which decides between tokens: often a finer one."""

    @abstractmethod
    def can_quantize(self, out_features: int, in_features: int) -> bool:
        """Whether a weight of this shape can be stored so; one that cannot stays as it is."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """weight: [out_features, in_features], any floating-point type, CPU. Named as `layer`'s buffers."""

    @abstractmethod
    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        """An empty layer, whose buffers on meta have the names, shapes and types that `quantize` gives."""
