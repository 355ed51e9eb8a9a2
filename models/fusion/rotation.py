"""The rotary embedding of queries and keys, as attention layers call it, by one kernel.

transformers' attention layers call a function of their own file, `apply_rotary_pos_emb(q, k, cos, sin)`. An instance's
forward is made anew of the same code with one name of its globals bound to ours, so that neither the class nor the file
changes. Ours calls theirs for whatever the kernel does not cover.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from cadenza.kernels import ops
from cadenza.models.fusion.norms import DTYPES
from cadenza.models.fusion.stand_in import is_close, outcome, random, simple_function

if TYPE_CHECKING:
    from cadenza.kernels.rotary import Pairing

_PARAMETERS = ["q", "k", "cos", "sin"]


@dataclass(frozen=True, slots=True)
class RotaryForm:
    pairing: "Pairing"
    is_partial: bool
    """Whether cos and sin may be narrower than heads, the rest of which is left."""


def rotating_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of the module's class, bound to the module and to our function; None: it calls none that we know."""
    function = simple_function(type(module).forward)
    if function is None:
        return None
    if function not in _FORWARDS:
        _FORWARDS[function] = _rebound(function)
    rebound = _FORWARDS[function]
    return None if rebound is None else MethodType(rebound, module)


_FORWARDS: dict[FunctionType, FunctionType | None] = {}


def _rebound(function: FunctionType) -> FunctionType | None:
    ours: dict[str, Any] = {}
    for name in function.__code__.co_names:
        theirs = function.__globals__.get(name)
        if isinstance(theirs, FunctionType) and (form := rotary_form(theirs)) is not None:
            ours[name] = _fused(theirs, form)
    if not ours:
        return None
    globals_ = {**function.__globals__, **ours}
    rebound = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__)
    rebound.__kwdefaults__ = function.__kwdefaults__
    rebound.__module__, rebound.__qualname__ = function.__module__, function.__qualname__
    return rebound


def _fused(theirs: Callable[..., Any], form: RotaryForm) -> Callable[..., Any]:
    from cadenza.kernels import rotary as kernels

    def rotate(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or not _covers(*args):
            return theirs(*args, **kwargs)
        rot, head_dim = kernels.rotated_width(args[2], form.pairing), args[0].shape[3]
        if rot > head_dim or rot % 2 or not (form.is_partial or rot == head_dim):
            return theirs(*args)
        q, k, cos, sin = args
        return kernels.rotary(q, k, cos.contiguous(), sin.contiguous(), pairing=form.pairing)

    return rotate


def _covers(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    every = (q, k, cos, sin)
    if not all(isinstance(part, Tensor) for part in every) or not ops.runs_triton(q.device):
        return False
    if any(part.dtype != q.dtype or part.device != q.device or part.requires_grad for part in every):
        return False
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or q.dtype not in DTYPES:
        return False
    num_tokens, head_dim = q.shape[2:]
    is_one_sequence = q.shape[0] == 1 and k.shape == (1, k.shape[1], num_tokens, head_dim)
    are_its_angles = cos.shape == sin.shape == (1, num_tokens, cos.shape[2]) and cos.shape[2] > 0
    return bool(is_one_sequence and are_its_angles and q.stride(3) == k.stride(3) == 1)


def rotary_form(function: FunctionType) -> RotaryForm | None:
    """What the function computes, if it rotates queries and keys [1, H, T, D] by cos and sin of [1, T, angles]."""
    if list(inspect.signature(function).parameters)[:4] != _PARAMETERS:
        return None
    for pairing in _pairings():
        if _agrees(function, pairing, 8, torch.float32) and _agrees(function, pairing, 8, torch.bfloat16):
            return RotaryForm(pairing, is_partial=_agrees(function, pairing, 4, torch.float32))
    return None


def _pairings() -> "tuple[Pairing, ...]":
    from cadenza.kernels.rotary import Pairing

    pairings: tuple[Pairing, ...] = get_args(Pairing)
    return pairings


def _agrees(function: FunctionType, pairing: "Pairing", rot: int, dtype: torch.dtype) -> bool:
    from cadenza.kernels.rotary import rotary_reference

    width = rot // 2 if pairing == "halves_of_pairs" else rot
    generator = torch.Generator().manual_seed(0)
    q, k = (random(generator, 1, heads, 5, 8, dtype=dtype) for heads in (3, 2))
    cos, sin = (random(generator, 1, 5, width, dtype=dtype) for _ in range(2))
    results = outcome(function, q.clone(), k.clone(), cos.clone(), sin.clone())
    if not isinstance(results, tuple) or len(results) != 2:
        return False
    for result, truth in zip(results, rotary_reference(q, k, cos, sin, pairing=pairing), strict=True):
        if dtype == torch.float32 and not is_close(result, truth):
            return False
        if not isinstance(result, Tensor) or result.dtype != dtype:
            return False
        if not torch.allclose(result.float(), truth.float(), rtol=0.05, atol=0.05):
            return False
    return True
