"""A mixture's experts with adapters: what answers for a parameter [experts, out, in] when it is indexed.

transformers' eager experts index their parameters by expert and give what they get to `F.linear` or to `@`. Here that
is the model's own matrix, quantized or not, and low-rank changes beside it; any other use fails loudly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class AdaptedStack:
    """In place of the parameter, for the rows of one set of adapters."""

    def __init__(
        self, base: Any, changes: Sequence[tuple[Tensor, Tensor, float]], *, is_transposed: bool
    ) -> None:
        """base: a parameter or an `ExpertStack`; changes: (a, b, scale), where b @ a has the parameter's shape;
        is_transposed: that is [experts, in_features, out_features]."""
        self._base, self._changes, self._is_transposed = base, changes, is_transposed

    def __getitem__(self, expert: int | Tensor) -> "_Matrix":
        number = int(expert)
        own = [(a[number], b[number], scale) for a, b, scale in self._changes]
        return _Matrix(self._base[number], own, self._is_transposed)


class _Matrix:
    def __init__(
        self, base: Any, changes: Sequence[tuple[Tensor, Tensor, float]], is_transposed: bool
    ) -> None:
        self._base, self._changes, self._is_transposed = base, changes, is_transposed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_fitting = len(args) > 1 and isinstance(args[1], cls) and not isinstance(args[0], cls)
        if not is_fitting or (function is not F.linear and function not in _MATMULS):
            raise TypeError(f"experts with adapters cannot be given to {function.__name__}")
        x, matrix = args[0], args[1]
        if (function is F.linear) == matrix._is_transposed:
            raise TypeError("experts with adapters lie the other way round than their module multiplies them")
        y = function(x, matrix._base, *args[2:], **(kwargs or {}))
        for a, b, scale in matrix._changes:
            change = x @ b @ a if matrix._is_transposed else F.linear(F.linear(x, a), b)
            y = y + (change if scale == 1.0 else change * scale)
        return y
