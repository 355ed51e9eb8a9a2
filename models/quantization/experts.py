"""The experts of a mixture, quantized one by one.

transformers keeps all experts' matrices of a layer in one 3-D parameter and multiplies with
`F.linear(x, self.down_proj[expert])`. A stack of quantized layers takes the parameter's place; what indexing gives
answers `F.linear`, and only that, so that any other use fails loudly instead of computing something else.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadenza.models.quantization.base import Method, QuantizedLinear


class ExpertStack(nn.Module):
    """In place of a parameter [experts, out_features, in_features]."""

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(layers)

    def __getitem__(self, expert: int | Tensor) -> "_Matrix":
        layer = self.experts[int(expert)]
        assert isinstance(layer, QuantizedLinear)
        return _Matrix(layer)


class _Matrix:
    """One expert's weight, as far as `F.linear` is concerned."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.linear or not isinstance(args[1], cls):
            raise TypeError(f"quantized experts can be given to F.linear only, not to {function.__name__}")
        y = args[1].layer(args[0])
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        return y if bias is None else y + bias


def stackable_parameters(module: nn.Module, method: Method) -> dict[str, tuple[int, int, int]]:
    """(experts, out_features, in_features) of each parameter of this module alone that a stack can replace.

    Only of modules that transformers has marked as experts (`use_experts_implementation`) with matrices the way
    `F.linear` wants them.
    """
    if getattr(module, "is_transposed", True) or not hasattr(module, "has_gate"):
        return {}
    return {
        name: (parameter.shape[0], parameter.shape[1], parameter.shape[2])
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and method.can_quantize(parameter.shape[1], parameter.shape[2])
    }


def put_stack(
    module: nn.Module, name: str, method: Method, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Replace the parameter by an empty stack. Its owner must use transformers' eager experts from now on."""
    num_experts, out_features, in_features = shape
    layers = [
        method.layer(in_features, out_features, has_bias=False, dtype=dtype) for _ in range(num_experts)
    ]
    delattr(module, name)
    module.add_module(name, ExpertStack(layers))
    config: Any = module.config
    config._experts_implementation = "eager"
