"""Forward hooks that apply adapters to the outputs of a model's own modules, one kind of hook for each kind of module.

Each holds what its module's adapters change, by slot. Low-rank changes of linear layers go through tables, for all rows
at once; everything else is computed set by set, on the rows of that set alone. What is computed for a row never depends
on the others.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadenza.decoding.adapters.batch import AdapterBatch, Placed, RowsOfSets
from cadenza.decoding.adapters.experts import AdaptedStack
from cadenza.decoding.adapters.tables import PlaneTables
from cadenza.kernels.lora import num_planes
from cadenza.models.adapters.adapter import Change, LinearChange, LowRank, ModuleChange
from cadenza.models.adapters.layout import Site
from cadenza.models.linear import PackedLinear

Batch = Callable[[], AdapterBatch | None]
"""What the step that is running knows of adapters; None: no row has one."""


class SiteHook(Protocol):
    def put(self, slot: int, change: Change) -> None: ...
    def clear(self, slot: int) -> None: ...
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Dense:
    """What a slot changes in a linear layer beside what lies in tables."""

    layer: Callable[[Tensor], Tensor] | None
    """x to y = x W'ᵀ + bias', where the whole weight is another."""
    gain: Tensor | None
    bias: Tensor | None
    """[out_features] in place of the layer's."""
    rows: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None
    """(output features, x to their values, bias included), in place of the layer's."""


class LinearHook:
    """y += Σ scale · ((x W'ᵀ + bias') - y), for each row with the W' and bias' of its set."""

    def __init__(
        self,
        site: Site,
        batch: Batch,
        tables: Callable[[], PlaneTables],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        base_bias: Callable[[], Tensor | None],
        *,
        is_output: bool,
        packs: bool,
    ) -> None:
        """tables: makes them, when the first low-rank change comes; is_output: it gets only rows whose logits are
        wanted; packs: whether whole weights can be laid out for the CPU."""
        self._site, self._batch, self._make_tables = site, batch, tables
        self._dtype, self._device = dtype, device
        self._base_bias, self._is_output, self._packs = base_bias, is_output, packs
        self._tables: PlaneTables | None = None
        self._planes = (0,) * num_slots
        self._dense: dict[int, _Dense] = {}

    def put(self, slot: int, change: Change) -> None:
        assert isinstance(change, LinearChange)
        if change.weight is not None:
            weight, bias = _whole(change), change.bias
            bias = self._base_bias() if bias is None else bias
            self._dense[slot] = _Dense(self._linear(weight, bias), None, None)
            return
        if change.gain is not None or change.bias is not None or change.rows is not None:
            self._base_bias()  # asked for now: inside a forward pass a layer that waits elsewhere cannot be asked
            gain, bias = (self._on_device(part) for part in (change.gain, change.bias))
            self._dense[slot] = _Dense(None, gain, bias, self._rows(change))
        if change.low_rank is not None:
            self._tables = self._tables or self._make_tables()
            self._tables.put(slot, change.low_rank)
            self._set_planes(slot, num_planes(change.low_rank.rank))

    def clear(self, slot: int) -> None:
        self._dense.pop(slot, None)
        if self._tables is not None and self._planes[slot]:
            self._tables.clear(slot)
            self._set_planes(slot, 0)

    def _set_planes(self, slot: int, count: int) -> None:
        self._planes = (*self._planes[:slot], count, *self._planes[slot + 1 :])

    def _rows(self, change: LinearChange) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        if change.rows is None:
            return None
        ids, values = change.rows
        bias = self._base_bias() if change.bias is None else self._on_device(change.bias)
        at = ids.to(self._device)
        return at, self._linear(values, None if bias is None else bias[at])

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device, self._dtype)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        weight = weight.to(self._device, self._dtype)
        bias = self._on_device(bias)
        if bias is not None and len(bias) < len(weight):
            bias = F.pad(bias, (0, len(weight) - len(bias)))
        return PackedLinear(weight, bias) if self._packs else lambda x: F.linear(x, weight, bias)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        batch = self._batch()
        if batch is None:
            return None
        rows = batch.kept if self._is_output else batch.every
        x = args[0]
        if x.numel() != len(rows.owner) * x.shape[-1]:
            raise RuntimeError(f"a layer was given {x.numel() // x.shape[-1]} tokens of {len(rows.owner)}")
        wide, width = output, output.shape[-1]
        if self._is_output and batch.num_tokens is not None and batch.num_tokens > width:
            wide = F.pad(output, (0, batch.num_tokens - width), value=-torch.inf)
        out = wide.view(-1, wide.shape[-1])
        if self._dense:
            flat = x.reshape(-1, x.shape[-1])
            for number, own in enumerate(rows.sets):
                if any(placed.slot in self._dense for placed in own):
                    self._replace(out, flat, rows, number, own)
        if self._tables is not None:
            out = out if wide is output else out[:, :width]
            rows.add_low_rank_(out, x, self._tables.a, self._tables.b, self._planes)
        return None if wide is output else wide

    def _replace(self, out: Tensor, x: Tensor, rows: RowsOfSets, number: int, own: Sequence[Placed]) -> None:
        """What is not low-rank, in the rows of one set."""
        at = rows.rows_of(number)
        width = self._site.out_features
        x, before = x[at], out[at][:, :width]
        changes = [
            (placed.scale, self._changed(self._dense[placed.slot], x, before))
            for placed in own
            if placed.slot in self._dense
        ]
        after = weighted(before, changes)[
            :, : out.shape[1]
        ]  # a table may have more rows than there are tokens
        out[:, : after.shape[1]].index_copy_(0, at, after)

    def _changed(self, dense: _Dense, x: Tensor, before: Tensor) -> Tensor:
        if dense.layer is not None:
            return dense.layer(x)
        base_bias = self._base_bias()
        after = before if base_bias is None else before - base_bias
        if dense.gain is not None:
            after = after * (1 + dense.gain)
        bias = base_bias if dense.bias is None else dense.bias
        after = after if bias is None else after + bias
        if dense.rows is not None:
            at, layer = dense.rows
            after = after.index_copy(1, at, layer(x))
        return after


def weighted(before: Tensor, changes: Sequence[tuple[float, Tensor]]) -> Tensor:
    """before + Σ scale · (after - before); what `before` has no columns for counts as 0 there. A single adapter at its
    full strength is what it is, without rounding."""
    if len(changes) == 1 and changes[0][0] == 1.0:
        return changes[0][1]
    width = max(after.shape[1] for _, after in changes)
    base = F.pad(before, (0, width - before.shape[1]))
    total = base
    for scale, after in changes:
        total = total + (F.pad(after, (0, width - after.shape[1])) - base) * scale
    return total


def _whole(change: LinearChange) -> Tensor:
    """[out_features, in_features]: W' where all of it is there."""
    assert change.weight is not None
    weight = change.weight
    if change.gain is None and change.low_rank is None and change.rows is None:
        return weight
    weight = weight.float()
    if change.gain is not None:
        weight = weight * (1 + change.gain.float())[:, None]
    if change.low_rank is not None:
        weight = weight + change.low_rank.b.float() @ change.low_rank.a.float()
    if change.rows is not None:
        weight = weight.index_copy(0, change.rows[0], change.rows[1].float())
    return weight


class ModuleHook:
    """Any other module that computes each token by itself: a copy with other parameters, given the set's rows alone."""

    def __init__(self, batch: Batch, dtype: torch.dtype, device: torch.device) -> None:
        self._batch, self._dtype, self._device = batch, dtype, device
        self._changes: dict[int, ModuleChange] = {}

    def put(self, slot: int, change: Change) -> None:
        assert isinstance(change, ModuleChange)

        def here(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, self._dtype)

        self._changes[slot] = ModuleChange(
            {name: here(value) for name, value in change.values.items()},
            {name: LowRank(here(part.a), here(part.b)) for name, part in change.low_rank.items()},
        )

    def clear(self, slot: int) -> None:
        self._changes.pop(slot, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        batch = self._batch()
        if batch is None or not self._changes:
            return None
        rows = batch.every
        for number, own in enumerate(rows.sets):
            terms = [
                (self._changes[placed.slot], placed.scale) for placed in own if placed.slot in self._changes
            ]
            if not terms:
                continue
            at, total = rows.rows_of(number), len(rows.owner)
            inputs = [_take(value, at, total) if isinstance(value, Tensor) else value for value in args]
            result = _with_changes(module, terms)(*inputs)
            _put(output, result, at, total)
        return None


def _row_dimension(tensor: Tensor, total: int) -> int:
    """Where the tokens are counted, in a tensor of all of them."""
    for dimension in range(min(2, tensor.ndim)):
        if tensor.shape[dimension] == total and all(size == 1 for size in tensor.shape[:dimension]):
            return dimension
    raise RuntimeError(f"a module was given {tuple(tensor.shape)} for {total} tokens")


def _take(tensor: Tensor, at: Tensor, total: int) -> Tensor:
    return tensor.index_select(_row_dimension(tensor, total), at)


def _put(output: Any, result: Any, at: Tensor, total: int) -> None:
    if isinstance(output, Tensor):
        output.index_copy_(_row_dimension(output, total), at, result.to(output.dtype))
        return
    for whole, part in zip(output, result, strict=True):
        if isinstance(whole, Tensor):
            _put(whole, part, at, total)


def _with_changes(module: nn.Module, terms: Sequence[tuple[ModuleChange, float]]) -> Callable[..., Any]:
    """The module's own forward, on parameters that are the module's plus Σ scale · difference."""
    shadow = copy.copy(module)
    shadow.__dict__ = dict(module.__dict__)
    for name in ("forward", "_old_forward"):  # accelerate leaves methods that are bound to the module itself
        shadow.__dict__.pop(name, None)
    for kind in ("_parameters", "_modules"):
        shadow.__dict__[kind] = dict(module.__dict__[kind])
    names = {name for change, _ in terms for name in (*change.values, *change.low_rank)}
    has_stacks = False
    for name in names:
        base: Any = shadow._modules.pop(name, None)
        base = shadow._parameters.pop(name, None) if base is None else base
        stacks = [
            (part.a, part.b, scale)
            for change, scale in terms
            if (part := change.low_rank.get(name)) is not None
        ]
        if any(a.ndim == 3 for a, _, _ in stacks):
            shadow.__dict__[name] = AdaptedStack(
                base, stacks, is_transposed=bool(getattr(module, "is_transposed", False))
            )
            has_stacks = True
        else:
            shadow.__dict__[name] = _parameter(base, name, terms)
    if has_stacks:  # the other ways to compute experts want whole tensors
        config: Any = copy.copy(module.config)
        shadow.__dict__["config"] = config
        config._experts_implementation = "eager"
    return shadow.forward


def _parameter(base: Any, name: str, terms: Sequence[tuple[ModuleChange, float]]) -> Tensor:
    total: Tensor = base
    for change, scale in terms:
        value: Tensor | None = change.values.get(name)
        if value is not None and len(terms) == 1 and scale == 1.0 and name not in change.low_rank:
            return value
        if value is not None:
            total = total + (value - base) * scale
        if (part := change.low_rank.get(name)) is not None:
            total = total + (part.b @ part.a) * scale
    return total
