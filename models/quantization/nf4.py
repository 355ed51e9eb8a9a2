"""nf4: 4 bits by the quantiles of a normal distribution (QLoRA), a float32 scale per 64 weights; bitsandbytes' format.

bitsandbytes makes the tensors and multiplies with them. On a CPU with bfloat16 instructions its fused product takes
activations, scales and results in bfloat16 (a result is off by 0.3 % at the root mean square); it sums every row in one
order whatever the number of rows, which each shape is asked for when a layer is prepared. Elsewhere weights are
dequantized piece by piece for `linear`'s packed product, which is as exact as float32 and several times slower.
Knows nothing of files or of how checkpoints store nf4.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from cadenza.models.errors import ModelError, one_line
from cadenza.models.linear import PackedLinear
from cadenza.models.quantization.base import Method, QuantizedLinear
from cadenza.models.quantization.int8 import Int8

BLOCK = 64
"""Weights that share a scale."""
_FUSED_ROWS = 32
"""Output features that the fused product computes at a time."""
_TRIAL_COUNTS = (1, 2, 3, 5, 16, 33, 64)
_AT_ONCE = 2**22  # weights in float32: 16 MB
_ANSWERS: dict[tuple[int, int, int], bool] = {}


@functools.cache
def bitsandbytes() -> Any:
    """The library's functions. Raises `ModelError` where it is missing or does not run."""
    # It warns that an optional kernel from a hub is missing, and asks for functions that are not used here to be
    # compiled, for which torch would read its compiler: two seconds.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with patch.object(torch, "compile", _as_it_is):
            import bitsandbytes.functional
    except Exception as error:  # a library that does not fit this system fails in ways of its own
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        reason = "" if missing else f" ({one_line(error)})"
        raise ModelError(
            f"quantization nf4 needs the bitsandbytes library{reason}: pip install 'cadenza[quantizers]'"
        ) from error
    return bitsandbytes.functional


def _as_it_is(function: Any = None, **options: Any) -> Any:
    """In the place of `torch.compile`, as a function and as a decorator."""
    return (lambda function: function) if function is None else function


class NF4(Method):
    def __init__(self) -> None:
        bitsandbytes()

    @property
    def key(self) -> str:
        return "nf4-1"

    @property
    def head(self) -> Method:
        return Int8()

    def can_quantize(self, out_features: int, in_features: int) -> bool:
        return in_features % BLOCK == 0

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        """qweight [out, in / 2] uint8, the first of two weights in the high half; absmax [out, in / 64] float32."""
        out_features, in_features = weight.shape
        parts = [
            bitsandbytes().quantize_4bit(weight[rows].float().contiguous(), blocksize=BLOCK, quant_type="nf4")
            for rows in _pieces(out_features, in_features)
        ]
        qweight = torch.cat([packed.view(-1, in_features // 2) for packed, _ in parts])
        return {
            "qweight": qweight,
            "absmax": torch.cat([state.absmax.view(-1, in_features // BLOCK) for _, state in parts]),
        }

    def layer(
        self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype
    ) -> QuantizedLinear:
        return NF4Linear(in_features, out_features, has_bias=has_bias, dtype=dtype)


class NF4Linear(QuantizedLinear):
    qweight: Tensor
    absmax: Tensor

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, has_bias=has_bias, dtype=dtype)
        self.register_buffer(
            "qweight", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta")
        )
        self.register_buffer(
            "absmax", torch.empty(out_features, in_features // BLOCK, dtype=torch.float32, device="meta")
        )
        self._is_fused = False

    def dequantized(self, start: int = 0, stop: int | None = None) -> Tensor:
        packed, absmax = self.qweight[start:stop], self.absmax[start:stop]
        shape = (len(packed), self.in_features)
        bitsandbytes()
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed.reshape(-1, 1), absmax.flatten(), BLOCK, "nf4", shape, torch.float32
        )
        return weight

    def lay_out(self) -> None:
        if self.qweight.device.type != "cpu" or self.out_features % _FUSED_ROWS or not _has_fused_product():
            return
        packed, absmax = interleaved(self.qweight), self.absmax.T.to(torch.bfloat16).contiguous()
        if _is_row_invariant(packed, absmax):
            self.qweight, self.absmax, self._is_fused = packed, absmax, True

    def apply_prepared(self, x: Tensor) -> Tensor:
        if self._is_fused:
            y = _fused_product(x, self.qweight, self.absmax)
        else:
            parts = [self._multiply(x, rows) for rows in _pieces(self.out_features, self.in_features)]
            y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias

    def _is_packed(self) -> bool:
        is_here = self.qweight.device.type == "cpu" and self.dtype == torch.float32
        return is_here and torch.backends.mkldnn.is_available()

    def _multiply(self, x: Tensor, rows: slice) -> Tensor:
        """[..., in_features] → [..., these of the output features]"""
        weight = self.dequantized(rows.start, rows.stop)
        if self._is_packed() and x.dtype == torch.float32:
            y: Tensor = PackedLinear(weight, None)(x)
            return y
        return F.linear(x, weight.to(x.dtype))

    @property
    def operator(self) -> str:
        if self._is_fused:
            return "bitsandbytes nf4, bfloat16 activations"
        return "oneDNN float32, packed from nf4 for every product" if self._is_packed() else super().operator


def interleaved(qweight: Tensor) -> Tensor:
    """[out, in / 2] uint8 as `quantize` gives it → as bitsandbytes' fused CPU product reads it, of the same shape.

    Of 32 output features, feature f and f + 16 share a byte, f in the low half; the bytes of one pair of inputs lie
    together. What `bitsandbytes.functional._convert_weight_packed_for_cpu` gives, in an eighth of its memory.
    """
    num_rows, width = qweight.shape
    low, high = qweight.view(-1, 2, _FUSED_ROWS // 2, width).unbind(1)
    even = (high & 0xF0) | (low >> 4)
    odd = (high << 4) | (low & 0xF)
    return torch.stack((even, odd), -1).transpose(1, 2).reshape(num_rows, width)


def _has_fused_product() -> bool:
    return bool(bitsandbytes().has_avx512bf16())


def _fused_product(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """x [..., in] → [..., out] in x's dtype, rounded to bfloat16; absmax [in / 64, out] bfloat16.

    The operator reads x as if it were contiguous, and divides by the number of rows.
    """
    shape = (len(packed), x.shape[-1])
    if not x.numel():
        return x.new_empty(*x.shape[:-1], len(packed))
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.contiguous(), packed, shape, absmax, _code(), BLOCK)
    return y


@functools.cache
def _code() -> Tensor:
    code: Tensor = bitsandbytes().get_4bit_type("nf4", device="cpu")
    return code


def _pieces(out_features: int, in_features: int) -> Iterator[slice]:
    """All rows of a weight, a few megabytes in float32 at a time."""
    step = max(64, _AT_ONCE // in_features // 64 * 64)
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def _is_row_invariant(packed: Tensor, absmax: Tensor) -> bool:
    """Whether the fused product gives a row the same bits beside any others; asked once for each shape."""
    in_features = 2 * packed.shape[1]
    key = (len(packed), in_features, torch.get_num_threads())
    if key not in _ANSWERS:
        rows = torch.arange(_TRIAL_COUNTS[-1] * in_features, dtype=torch.float32).sin_().view(-1, in_features)
        whole = _fused_product(rows, packed, absmax)
        _ANSWERS[key] = all(
            torch.equal(_fused_product(rows[-count:], packed, absmax), whole[-count:])
            for count in _TRIAL_COUNTS
        )
    return _ANSWERS[key]
