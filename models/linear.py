"""Linear layers laid out for the CPU: oneDNN's packed weights instead of row-major ones.

Two reasons, measured on two AVX512 cores with SmolLM2-135M's weights. Speed: one row takes half of `F.linear`'s
time, sixteen rows too. Determinism: `F.linear` picks a kernel, and so an order of summation, by the number of
rows; a packed weight has one order for any number of rows, so that a token's hidden state does not depend on
what else is in the batch. One exception was found: a single row, for some shapes and versions, which is then
given a companion (each weight is asked when it is packed).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_TRIAL_COUNTS = (1, 2, 3, 8, 15, 16, 17, 48, 100, 128, 512)
_TRIAL_WORK = 25 * 10**7  # multiplications per trial, so that asking stays quick for large weights
_ANSWERS: dict[tuple[int, int, bool, torch.dtype, int], tuple[bool, bool]] = {}
_ROWS_HINT = 32  # the layout oneDNN chooses for this row count serves every other count bit for bit alike


def _packed_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return (torch.float32, *(dtype for dtype, is_supported in supported.items() if is_supported()))


PACKED_DTYPES = _packed_dtypes()
"""What this build of torch has packed products for on this CPU: bfloat16 with AVX512, float16 with instructions of its
own only; without them torch's products in float16 take 3 to 13 times as long as packed ones in float32 (4 to 128 rows).
"""


class _Packed(nn.Module):
    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype

    @property
    def weight(self) -> Tensor:
        """The shape and dtype of the weight, for modeling code that asks; it has no data."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedLinear(_Packed):
    """`y = x Wᵀ + b` with a weight that only oneDNN can read; x [..., in_features] on the CPU.

    All of one of `PACKED_DTYPES`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out_features, in_features]; bias: [out_features] or None. The weight is copied."""
        super().__init__(weight.shape[1], weight.shape[0], weight.dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._sums_single_rows_otherwise, self.is_row_invariant = self._ask()

    def _ask(self) -> tuple[bool, bool]:
        """(a single row is summed in another order, any number of rows from 2 on is summed in one order).

        oneDNN decides by shape, so that one weight answers for all of its shape.
        """
        has_bias = self._bias is not None
        key = (self.out_features, self.in_features, has_bias, self.dtype, torch.get_num_threads())
        if key not in _ANSWERS:
            most = max(2, _TRIAL_WORK // (self.out_features * self.in_features))
            counts = [count for count in _TRIAL_COUNTS if count <= most]
            rows = torch.arange(counts[-1] * self.in_features, dtype=torch.float32).sin_()
            rows = rows.view(-1, self.in_features).to(self.dtype)
            single, *several = [self._apply_packed(rows[:count]) for count in counts]
            is_single_otherwise = not torch.equal(single, several[0][:1])
            _ANSWERS[key] = (
                is_single_otherwise,
                all(torch.equal(result[:2], several[0]) for result in several),
            )
        return _ANSWERS[key]

    def forward(self, x: Tensor) -> Tensor:
        if self._sums_single_rows_otherwise and x.numel() == self.in_features:
            pair = x.reshape(1, -1).expand(2, -1)
            return self._apply_packed(pair)[:1].view(*x.shape[:-1], self.out_features)
        return self._apply_packed(x)

    def _apply_packed(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


class PackedGroup:
    """Linear layers that are always given the same tensor, computed as one product when the first of them is called.

    The others find their share by the identity of the input tensor; given another one, they compute again.
    """

    def __init__(self, layer: nn.Module, in_features: int, sizes: Sequence[int]) -> None:
        """layer: gives the outputs of all layers side by side; sizes: how many belong to each."""
        self.layer = layer
        self._in_features = in_features
        self._sizes = list(sizes)
        self._dtype = getattr(layer, "dtype", torch.float32)
        self._input: Tensor | None = None
        self._shares: list[Tensor | None] = []
        self._num_left = 0

    def members(self) -> list["PackedMember"]:
        """One layer for each of the layers that the group was made of."""
        return [
            PackedMember(self, number, self._in_features, size, self._dtype)
            for number, size in enumerate(self._sizes)
        ]

    def take(self, number: int, x: Tensor) -> Tensor:
        """Layer `number`'s output for x."""
        share = self._shares[number] if x is self._input else None
        if share is None:
            share = self._compute(x)[number]
        self._shares[number] = None
        self._num_left -= 1
        if not self._num_left:
            self._input, self._shares = None, []
        return share

    def _compute(self, x: Tensor) -> list[Tensor]:
        shares: list[Tensor] = list(self.layer(x).split_with_sizes(self._sizes, dim=-1))
        self._input, self._shares, self._num_left = x, list(shares), len(shares)
        return shares


class PackedMember(_Packed):
    """One layer of a group."""

    def __init__(
        self, group: PackedGroup, number: int, in_features: int, out_features: int, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self._group = group
        self._number = number

    @property
    def joined(self) -> nn.Module:
        """The layer that computes for the whole group."""
        return self._group.layer

    def forward(self, x: Tensor) -> Tensor:
        return self._group.take(self._number, x)


def computing_layers(module: nn.Module) -> Iterator[nn.Module]:
    """All modules below, each once; in place of a group's members the layer that computes for them."""
    seen: set[nn.Module] = set()
    for part in module.modules():
        layer = part.joined if isinstance(part, PackedMember) else part
        if layer not in seen:
            seen.add(layer)
            yield layer
