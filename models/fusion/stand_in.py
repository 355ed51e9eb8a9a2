"""Asks a class what its forward computes, without the weights of any instance, and puts another forward in its place.

A stand-in is an instance with the numbers and switches of a module, and with functions where the module has children.
So a trial needs no weights, which may be quantized, packed or on meta, and trusts no names of classes.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def stand_in(module: nn.Module, **parts: Any) -> Any:
    """parts: what its class's forward finds as attributes, where the module has children or parameters."""
    twin: Any = module.__new__(type(module))
    nn.Module.__init__(twin)
    twin.__dict__.update(plain_values(module))
    twin.__dict__.update(parts)
    return twin


def plain_values(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What tells stand-ins of one class apart."""
    return tuple((name, value) for name, value in vars(module).items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def outcome(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it returns; None where it fails, in whatever way: code that cannot work with stand-ins is not understood."""
    try:
        with torch.no_grad():
            return forward(*args, **kwargs)
    except Exception:
        return None


def is_close(result: Any, truth: Tensor) -> bool:
    """Whether it is the same tensor up to the rounding of float32."""
    if not isinstance(result, Tensor) or result.shape != truth.shape or not truth.isfinite().all():
        return False
    return torch.allclose(result.to(truth.dtype), truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()))


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The class's forward, bound; None: the instance has another. Hooks of accelerate keep it aside."""
    current = vars(module).get(_place(module))
    if current is not None and getattr(current, "__func__", None) is not type(module).forward:
        return None
    forward: Any = type(module).forward
    bound: Callable[..., Any] = forward.__get__(module)
    return bound


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """On this instance alone. Its hooks, accelerate's among them, run as before."""
    vars(module)[_place(module)] = forward


def _place(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def simple_function(forward: Any) -> FunctionType | None:
    """The function itself, where nothing is wrapped around it and it holds no variables of others."""
    is_simple = isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__")
    return forward if is_simple and forward.__closure__ is None else None


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_idle_in_eval(part: nn.Module) -> bool:
    """Whether it returns what it is given, unless one trains."""
    return type(part) in (nn.Dropout, nn.Identity)


def has_tensors(module: nn.Module) -> bool:
    """Parameters or buffers of its own, which it may compute with."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in own)
