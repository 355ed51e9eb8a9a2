"""Layers that wait elsewhere: their tensors come when they are called and go when they have answered.

`LayerStream` brings a whole layer, lays it out as resident layers are, and asks for the next one to be read
meanwhile. `RowStream` brings the rows of an embedding that are looked up. Both are accelerate's `ModelHook`s; its own
hook opens a file for every tensor, reads nothing ahead and knows nothing of layers laid out for their device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from cadenza.models.install import Slot, slots
from cadenza.models.quantization.base import QuantizedLinear
from cadenza.models.weights import FileWeights

LayOut = Callable[[nn.Module], object]
"""Brings a layer into the form that its device computes with, in place."""


class StreamedLayer(nn.Module):
    """Holds a single layer, such as the output layer, so that there is a place where its laid out form can be put."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class LayerStream(ModelHook):  # type: ignore[misc]
    """Before `lay_out_with` the layer computes as it is; afterwards laid out, each time anew or once for all."""

    def __init__(
        self, name: str, module: nn.Module, weights: FileWeights, device: torch.device, *, is_resident: bool
    ) -> None:
        """name: of the layer in the weights, which hold its tensors. is_resident: it stays once it is laid out."""
        self.module, self.name = module, name
        self.is_resident = is_resident
        self.following: LayerStream | None = None
        """Whose turn is next."""
        self.when_there: Callable[[str, nn.Module], object] | None = None
        """Called with the layer's name and the layer whenever it has come and is laid out."""
        self._weights, self._device = weights, device
        self._lay_out: LayOut | None = None
        self._children = [(part, dict(part._modules)) for part in module.modules()]
        self._empty = [(slot, _current(slot).to("meta")) for slot in self._slots()]
        self._is_there = False
        self._go()
        add_hook_to_module(module, self)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self._empty)

    def lay_out_with(self, lay_out: LayOut) -> None:
        """From now on the layer computes as `lay_out` makes it; a resident one is made so now."""
        self._lay_out = lay_out
        if self.is_resident:
            self._come()
            remove_hook_from_module(self.module)
            self._children, self._empty = [], []

    def read_ahead(self) -> None:
        self._weights.read_ahead(slot.name for slot, _ in self._empty)

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._is_there:  # the last forward pass has failed half-way
            self._go()
        if self.following is not None:
            self.following.read_ahead()
        self._come()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._go()
        return output

    def _slots(self) -> list[Slot]:
        inner = self.module.layer if isinstance(self.module, StreamedLayer) else self.module
        return [slot for slot in slots(inner, self.name) if slot.name in self._weights]

    def _come(self) -> None:
        self._is_there = True
        if self._lay_out is not None:
            self._use_twins()
        views: dict[str, int] = {}
        for slot in self._slots():
            tensor = self._weights[slot.name]
            if self._device.type != "cpu":
                tensor = tensor.to(self._device, non_blocking=True)
            elif self._weights.is_view(slot.name):
                views[slot.name] = tensor.data_ptr()
            slot.put(tensor)
        if self._lay_out is not None:
            self._lay_out(self.module)
            for (
                slot
            ) in self._slots():  # what is computed with as it is must be aligned as tensors in memory are
                if (tensor := _current(slot)).data_ptr() == views.get(slot.name):
                    slot.put(tensor.clone())
        self._weights.release()
        if self.when_there is not None:
            self.when_there(self.name, self.module)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The layer is there inside the block, for who wants something else of it than its forward pass."""
        self._come()
        try:
            yield
        finally:
            self._go()

    def _use_twins(self) -> None:
        """Copies of the quantized layers, which laying out changes, with the same empty tensors."""
        for part, children in self._children:
            for name, child in children.items():
                if isinstance(child, QuantizedLinear):
                    part._modules[name] = _twin(child)

    def _go(self) -> None:
        for part, children in self._children:
            part._modules.clear()
            part._modules.update(children)
        for slot, empty in self._empty:
            slot.put(empty)
        self._is_there = False


class RowStream(ModelHook):  # type: ignore[misc]
    """On an embedding whose table stays where it is: the rows that are looked up become a table of their own."""

    def __init__(self, name: str, module: nn.Module, weights: FileWeights, device: torch.device) -> None:
        """Every tensor of the module must have a row for each token."""
        self._weights, self._device = weights, device
        self._slots = [(slot, _current(slot).to("meta")) for slot in slots(module, name)]
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # matters to gradients only, and must be a row of the table
        self._empty_table()
        add_hook_to_module(module, self)

    def pre_forward(
        self, module: nn.Module, ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = ids.reshape(-1).cpu()
        for slot, empty in self._slots:
            slot.put(self._weights.as_stored(slot.name)[rows].to(empty.dtype).to(self._device))
        return (torch.arange(len(rows), device=ids.device).view(ids.shape), *args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._empty_table()
        return output

    def _empty_table(self) -> None:
        for slot, empty in self._slots:
            slot.put(empty)


def streams_of(module: nn.Module) -> list[LayerStream]:
    """The streams of layers below `module`, in the order of the layers."""
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    return [hook for hook in hooks if isinstance(hook, LayerStream)]


def _current(slot: Slot) -> Tensor:
    tensor = getattr(slot.owner, slot.attribute)
    assert isinstance(tensor, Tensor)
    return tensor


def _twin(layer: QuantizedLinear) -> QuantizedLinear:
    twin = layer.__new__(type(layer))
    twin.__dict__ = dict(layer.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(twin, name, dict(getattr(layer, name)))
    return twin
