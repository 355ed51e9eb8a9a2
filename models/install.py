"""Puts tensors from files into an empty module, on the device that is to compute with them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadenza.models.weights import FileWeights


@dataclass(frozen=True, slots=True)
class Slot:
    """Where in a module a tensor belongs."""

    owner: nn.Module
    attribute: str
    name: str
    """In the weights."""

    def put(self, tensor: Tensor) -> None:
        if self.attribute in self.owner._parameters:
            self.owner._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.attribute] = tensor


def slots(module: nn.Module, prefix: str = "") -> list[Slot]:
    """Of everything that a checkpoint holds below `module`: parameters and persistent buffers, tied ones each."""
    found = []
    for path, part in module.named_modules(prefix=prefix):
        names = [name for name, tensor in part._parameters.items() if tensor is not None]
        names += [name for name in part._buffers if name not in part._non_persistent_buffers_set]
        found += [Slot(part, name, f"{path}.{name}" if path else name) for name in names]
    return found


def install(places: Sequence[Slot], weights: FileWeights, device: torch.device) -> None:
    """Copy tensors from their files to the device; slots that are tied to the same tensor share the copy."""
    uses = Counter(weights.identity(slot.name) for slot in places)
    shared: dict[Hashable, Tensor] = {}
    for slot in places:
        identity = weights.identity(slot.name)
        tensor = shared.get(identity)
        if tensor is None:
            tensor = weights[slot.name].to(device, copy=True)
            if uses[identity] > 1:
                shared[identity] = tensor
        slot.put(tensor)
        weights.release()
