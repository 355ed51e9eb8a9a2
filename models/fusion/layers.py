"""Decoder layers of the pre-norm form, with each residual sum and the norm after it in one kernel:

    h = x + attention(norm1(x))        out = h + feed_forward(norm2(h))

The sum at the end takes the next layer's first norm, or the model's last one, along (`norms.FusedNorm.add`). Children
are called as modules, so that their hooks run; a layer with a forward hook of its own hands nothing on, since the hook
may change what it returns.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from cadenza.kernels import ops
from cadenza.models.fusion.norms import FusedNorm
from cadenza.models.fusion.stand_in import (
    has_tensors,
    is_close,
    is_idle_in_eval,
    outcome,
    plain_values,
    random,
    stand_in,
)

_WIDTH = 6  # of trials


@dataclass(frozen=True, slots=True)
class LayerForm:
    """Names of the layer's children, and how it calls its attention."""

    first_norm: str
    attention: str
    second_norm: str
    feed_forward: str
    keyword: str | None
    """What the attention is given the normed hidden states as; None: its first argument."""
    defaults: Mapping[str, Any]
    """What the attention is told beside them, where the layer is told nothing."""
    kept: frozenset[str]
    """Arguments of the layer that its attention never sees."""


class FusedLayer:
    """In place of the forward of one layer."""

    def __init__(
        self, module: nn.Module, form: LayerForm, second_norm: FusedNorm, original: Callable[..., Any]
    ) -> None:
        self._module, self._form, self._second_norm, self._original = module, form, second_norm, original
        self.following: FusedNorm | None = None
        """The norm that is given what the layer returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or not self._covers(args[0]):
            return self._original(*args, **kwargs)
        x, form, module = args[0], self._form, self._module
        told = {**form.defaults, **{name: kwargs[name] for name in kwargs if name not in form.kept}}
        normed = getattr(module, form.first_norm)(x)
        attention = getattr(module, form.attention)
        attended = (
            attention(normed, **told) if form.keyword is None else attention(**{form.keyword: normed}, **told)
        )
        total = self._second_norm.add(attended[0], x)
        change = getattr(module, form.feed_forward)(getattr(module, form.second_norm)(total))
        if isinstance(change, tuple):  # of experts, with the scores of their router
            change = change[0]
        if self.following is None or module._forward_hooks:
            return total + change
        return self.following.add(change, total)

    def _covers(self, x: Any) -> bool:
        return isinstance(x, Tensor) and not self._module.training and ops.runs_triton(x.device)


_FORMS: dict[Any, LayerForm | None] = {}


def layer_form(module: nn.Module, norms: Mapping[nn.Module, FusedNorm]) -> LayerForm | None:
    """What the module computes, if it is such a layer. norms: those that were replaced."""
    children = dict(module.named_children())
    idle = [name for name, child in children.items() if is_idle_in_eval(child)]
    own = [name for name, child in children.items() if child in norms]
    parts = [name for name in children if name not in own and name not in idle]
    if module.training or len(own) != 2 or len(parts) != 2:
        return None
    if has_tensors(module):
        return None
    key = (type(module), plain_values(module), tuple(own), tuple(parts), tuple(idle))
    if key not in _FORMS:
        trials = (
            _Trial(module, norm, part, idle, feeds_pairs=feeds_pairs)
            for norm in permutations(own)
            for part in permutations(parts)
            for feeds_pairs in (False, True)
        )
        forms = (_tried(module, trial) for trial in trials)
        _FORMS[key] = next((form for form in forms if form is not None), None)
    return _FORMS[key]


class _Trial:
    """A layer of functions: what its attention is given is kept. feeds_pairs: its feed-forward layer returns something
    beside hidden states, as that of a mixture of experts may."""

    def __init__(
        self,
        module: nn.Module,
        norms: tuple[str, ...],
        parts: tuple[str, ...],
        idle: list[str],
        *,
        feeds_pairs: bool,
    ) -> None:
        self.names = (norms[0], parts[0], norms[1], parts[1])
        generator = torch.Generator().manual_seed(0)
        self.x = random(generator, 1, 3, _WIDTH)
        weights = [random(generator, _WIDTH, _WIDTH) for _ in range(4)]
        self._first, self._attend, self._second, self._feed = (_function(weight) for weight in weights)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        own: dict[str, Any] = {name: getattr(module, name).forward for name in idle}
        own |= {norms[0]: self._first, norms[1]: self._second, parts[0]: self._attention}
        own[parts[1]] = (lambda x: (self._feed(x), None)) if feeds_pairs else self._feed
        self._class, self._twin = type(module), stand_in(module, **own)

    def _attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.args, self.kwargs = args, kwargs
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return self._attend(given[0]), None

    def run(self, told: Mapping[str, Any]) -> bool:
        """Whether the layer computes what is expected."""
        x = self.x
        middle = x + self._attend(self._first(x))
        truth = middle + self._feed(self._second(middle))
        self.args, self.kwargs = (), {}
        return is_close(outcome(self._class.forward, self._twin, x.clone(), **told), truth)


def _function(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(x @ weight)


def _tried(module: nn.Module, trial: _Trial) -> LayerForm | None:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    required = {each.name: object() for each in named if each.default is each.empty}
    told: dict[str, Any] = {each.name: object() for each in named}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        told["an_argument_that_no_class_knows"] = object()
    if not trial.run(required):
        return None
    keyword, defaults = _hidden_apart(trial.args, trial.kwargs)
    if defaults is None or not trial.run(told):
        return None
    same_keyword, received = _hidden_apart(trial.args, trial.kwargs)
    if received is None or same_keyword != keyword:
        return None
    defaults = {name: value for name, value in defaults.items() if name not in required}
    kept = told.keys() - received.keys()
    expected = {**defaults, **{name: value for name, value in told.items() if name not in kept}}
    if expected.keys() != received.keys() or any(expected[name] is not received[name] for name in expected):
        return None
    return LayerForm(*trial.names, keyword, defaults, frozenset(kept))


def _hidden_apart(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any] | None]:
    """(the keyword of the only tensor, the other keywords); None for these: something else was given."""
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    others = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    if not args and len(tensors) == 1:
        return tensors[0], others
    if len(args) == 1 and isinstance(args[0], Tensor) and not tensors:
        return None, others
    return None, None
