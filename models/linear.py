"""Linear layers laid out for the CPU: oneDNN's packed weights instead of row-major ones.

Two reasons, measured on two AVX512 cores with SmolLM2-135M's weights. Speed: one row takes half of `F.linear`'s
time, sixteen rows too. Determinism: `F.linear` picks a kernel, and so an order of summation, by the number of
rows; a packed weight has one order for any number of rows, so that a token's hidden state does not depend on
what else is in the batch. One exception was found: a single row, for some shapes and versions, which is then
given a companion (each weight is asked when it is packed).
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PACKED_DTYPES = (torch.float32,)
_ROWS_HINT = 32  # the layout oneDNN chooses for this row count serves every other count bit for bit alike


class PackedLinear(nn.Module):
    """`y = x Wᵀ + b` with a weight that only oneDNN can read; x [..., in_features] float32 on the CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out_features, in_features] float32; bias: [out_features] or None. The weight is copied."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        rows = torch.arange(2.0 * self.in_features).sin_().view(2, -1)
        pair, alone = self._apply_packed(rows), [self._apply_packed(row[None]) for row in rows]
        self._sums_single_rows_otherwise = not torch.equal(pair, torch.cat(alone))

    def forward(self, x: Tensor) -> Tensor:
        if self._sums_single_rows_otherwise and x.numel() == self.in_features:
            pair = x.reshape(1, -1).expand(2, -1)
            return self._apply_packed(pair)[:1].view(*x.shape[:-1], self.out_features)
        return self._apply_packed(x)

    def _apply_packed(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"
        )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the packed operators for weights on `device` in `dtype`."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available()


def pack_linears(module: nn.Module) -> int:
    """Replace, in place, every linear layer below `module` by a packed one; returns how many.

    Covers `nn.Linear` and GPT-2's `Conv1D` (a linear layer with its weight transposed). Row-major weights are
    released as they are packed unless something else, such as a tied embedding, holds them.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                weight = child.weight.detach()
            elif isinstance(child, Conv1D):
                weight = child.weight.detach().T
            else:
                continue
            bias = None if child.bias is None else child.bias.detach()
            setattr(parent, name, PackedLinear(weight, bias))
            count += 1
    return count
