"""The float weights of a quantized checkpoint, each made from its parts when it is asked for.

Takes as much memory as the largest weight in float32. Knows no format.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Stored
from cadenza.models.prequantized.lattice import Lattice
from cadenza.models.weights import FileWeights, Place, tensors_of

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class DequantizedWeights(FileWeights):
    """Tensors by the names that an unquantized checkpoint has for them.

    `as_stored` gives those that were quantized in float32.
    """

    def __init__(
        self, places: Mapping[str, Place], weights: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """places: all tensors of the files. dtypes: as what tensors are wanted, where not as they are."""
        self._weights, self._dtypes = dict(weights), dict(dtypes)
        self._parts = FileWeights(places)
        consumed = set(chain.from_iterable(stored.names.values() for stored in weights.values()))
        super().__init__(
            {
                name: Place(at.file, at.offset, at.stored, at.shape, dtypes.get(name, at.wanted))
                for name, at in places.items()
                if name not in consumed
            }
        )

    def is_quantized(self, name: str) -> bool:
        return name in self._weights

    def lattice(self, name: str) -> Lattice | None:
        """The weight as it was quantized; None for a tensor that is not."""
        if name not in self._weights:
            return None
        stored = self._weights[name]
        return stored.read({part: self._parts[source] for part, source in stored.names.items()})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._weights:
            return super().__getitem__(name)
        return self.as_stored(name).to(self._dtypes.get(name, torch.float32))

    def as_stored(self, name: str) -> Tensor:
        lattice = self.lattice(name)
        return super().as_stored(name) if lattice is None else lattice.dequantized()

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from self._weights

    def __len__(self) -> int:
        return super().__len__() + len(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape if name in self._weights else self._places[name].shape

    def identity(self, name: str) -> Hashable:
        return ("dequantized", name) if name in self._weights else super().identity(name)

    def num_bytes(self, name: str) -> int:
        if name not in self._weights:
            return super().num_bytes(name)
        return prod(self._weights[name].shape) * self._dtypes.get(name, torch.float32).itemsize

    def is_view(self, name: str) -> bool:
        return name not in self._weights and super().is_view(name)

    def read_ahead(self, names: Iterable[str]) -> None:
        names = list(names)
        super().read_ahead(name for name in names if name not in self._weights)
        stored = [self._weights[name] for name in names if name in self._weights]
        self._parts.read_ahead(chain.from_iterable(weight.names.values() for weight in stored))

    def release(self) -> None:
        super().release()
        self._parts.release()

    def alias(self, name: str, other: str) -> None:
        """From now on `name` is another name of `other`, which is not quantized."""
        self._places[name] = self._places[other]


def open_weights(
    files: Iterable[Path], stored_format: Format, dtypes: Mapping[str, torch.dtype]
) -> DequantizedWeights:
    """Raises `ModelError` where a tensor beside a quantized weight is not understood.

    A scale that is left out is a wrong answer.
    """
    places = {
        name: Place(file, offset, dtype, shape, dtype)
        for file in files
        for name, (offset, dtype, shape) in tensors_of(file).items()
    }
    weights = stored_format.weights(FileWeights(places))
    if not weights:
        raise ModelError(
            f"the model's quantization_config says {stored_format.label}, but no weight is stored so"
        )
    opened = DequantizedWeights(places, weights, dtypes)
    layers = {name.rpartition(".")[0] for name in weights}
    for name in opened:
        layer, _, last = name.rpartition(".")
        if name in weights or last in stored_format.ignored:
            continue
        if (layer in layers and last not in ("weight", "bias")) or (
            last == "weight" and places[name].stored not in _FLOATS
        ):
            raise ModelError(
                f"{name} is not understood: no such tensor belongs to {stored_format.label} weights"
            )
    return opened


def fitting(weights: DequantizedWeights, module: Any) -> bool:
    """Whether these are all tensors of the module, by its names; tied ones, which are left out, become aliases.

    Raises `ModelError` where a shape is not the module's, or a bias would be lost.
    """
    wanted = dict(module.state_dict())
    for name, other in module.all_tied_weights_keys.items():
        if name not in weights and other in weights and not weights.is_quantized(other):
            weights.alias(name, other)
    if any(name not in weights for name in wanted):
        return False
    for name, tensor in wanted.items():
        if weights.shape(name) != tuple(tensor.shape):
            raise ModelError(
                f"{name} is {list(weights.shape(name))} in the checkpoint, {list(tensor.shape)} in the model"
            )
    for name in weights:  # AutoGPTQ writes biases of zeros for layers that have none
        if name not in wanted and name.endswith(".bias") and bool(weights[name].any()):
            raise ModelError(f"{name} is in the checkpoint, but the model adds nothing there")
    return True
