"""Gated feed-forward layers, `down(act(gate(x)) * up(x))`, with one kernel between the products.

gate and up may be two layers or halves of one. Knows nothing of what the layers are made of: they are called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadenza.kernels import ops
from cadenza.models.activation import ACTIVATIONS, RowwiseActivation
from cadenza.models.fusion.norms import DTYPES
from cadenza.models.fusion.stand_in import (
    has_hooks,
    has_tensors,
    is_close,
    is_idle_in_eval,
    outcome,
    plain_values,
    random,
    stand_in,
)

if TYPE_CHECKING:
    from cadenza.kernels.gated_activation import Activation

_WIDTH, _INNER = 6, 5  # of trials


@dataclass(frozen=True, slots=True)
class GatedForm:
    """Names of the layer's children."""

    gate: str
    """Of the merged layer, where `up` is None."""
    up: str | None
    down: str
    activation: str
    kind: "Activation"
    gate_is_first: bool = True
    """Half of a merged layer."""


class FusedFeedForward:
    """In place of the forward of one layer."""

    def __init__(self, module: nn.Module, form: GatedForm, original: Callable[..., Any]) -> None:
        from cadenza.kernels.gated_activation import gated_activation

        self._module, self._form, self._original, self._kernel = module, form, original, gated_activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self._covers(args[0]):
            return self._original(*args, **kwargs)
        x, form, module = args[0], self._form, self._module
        gate, up = _gate_and_up(module, form, x)
        if self._can_take(gate, up):
            width = gate.shape[-1]
            gated = self._kernel(gate.reshape(-1, width), up.reshape(-1, width), form.kind).view(gate.shape)
        else:
            gated = getattr(module, form.activation)(gate) * up
        return getattr(module, form.down)(gated)

    def _covers(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or self._module.training or not ops.runs_triton(x.device):
            return False
        return not has_hooks(getattr(self._module, self._form.activation))

    def _can_take(self, gate: Tensor, up: Tensor) -> bool:
        is_alike = gate.shape == up.shape and gate.dtype == up.dtype
        is_ours = gate.dtype in DTYPES and ops.runs_triton(gate.device) and gate.device == up.device
        is_in_rows = gate.stride(-1) == up.stride(-1) == 1
        return is_alike and is_ours and is_in_rows and not (gate.requires_grad or up.requires_grad)


def _gate_and_up(module: Any, form: GatedForm, x: Tensor) -> tuple[Tensor, Tensor]:
    if form.up is not None:
        return getattr(module, form.gate)(x), getattr(module, form.up)(x)
    first, second = getattr(module, form.gate)(x).chunk(2, dim=-1)
    return (first, second) if form.gate_is_first else (second, first)


_FORMS: dict[Any, GatedForm | None] = {}


def gated_form(module: nn.Module) -> GatedForm | None:
    """What the module computes, if it is such a layer."""
    children = dict(module.named_children())
    activations = [name for name, child in children.items() if isinstance(child, _ACTIVATIONS)]
    idle = [name for name, child in children.items() if is_idle_in_eval(child)]
    layers = [name for name in children if name not in activations and name not in idle]
    if module.training or len(activations) != 1 or len(layers) not in (2, 3) or has_tensors(module):
        return None
    activation = children[activations[0]]
    inner = activation.activation if isinstance(activation, RowwiseActivation) else activation
    key = (
        type(module),
        plain_values(module),
        tuple(layers),
        type(activation),
        type(inner),
        plain_values(inner),
    )
    if key not in _FORMS:
        _FORMS[key] = _tried(module, layers, activations[0], idle)
    return _FORMS[key]


_ACTIVATIONS = (*ACTIVATIONS, RowwiseActivation, nn.SiLU, nn.GELU)


def _tried(module: nn.Module, layers: list[str], activation: str, idle: list[str]) -> GatedForm | None:
    kind = activation_kind(getattr(module, activation))
    if kind is None:
        return None
    if len(layers) == 3:
        forms = [GatedForm(gate, up, down, activation, kind) for gate, up, down in permutations(layers)]
    else:
        forms = [
            GatedForm(merged, None, down, activation, kind, is_first)
            for merged, down in permutations(layers)
            for is_first in (True, False)
        ]
    return next((form for form in forms if _agrees(module, form, idle)), None)


def activation_kind(activation: nn.Module) -> "Activation | None":
    generator = torch.Generator().manual_seed(0)
    x = random(generator, 4, 64, dtype=torch.float64) * 3
    result = outcome(activation.forward, x.clone())
    if is_close(result, F.silu(x)):
        return "silu"
    return "gelu_tanh" if is_close(result, F.gelu(x, approximate="tanh")) else None


def _agrees(module: nn.Module, form: GatedForm, idle: list[str]) -> bool:
    generator = torch.Generator().manual_seed(0)
    names = [form.gate, *([] if form.up is None else [form.up])]
    inner = _INNER if form.up is not None else 2 * _INNER
    parts: dict[str, Any] = {name: _linear(generator, _WIDTH, inner) for name in names}
    parts[form.down] = _linear(generator, _INNER, _WIDTH)
    parts |= {name: getattr(module, name).forward for name in [form.activation, *idle]}
    twin = stand_in(module, **parts)
    for scale in (1.0, 50.0):  # so that clamped values show
        x = random(generator, 1, 3, _WIDTH, dtype=torch.float64) * scale
        gate, up = _gate_and_up(twin, form, x)
        truth = parts[form.down](parts[form.activation](gate) * up)
        if not is_close(outcome(type(module).forward, twin, x.clone()), truth):
            return False
    return True


def _linear(generator: torch.Generator, inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    weight = random(generator, inputs, outputs, dtype=torch.float64)
    return lambda x: x @ weight
