"""Which module each tensor of an adapter belongs to: the names in the file, against those in the model.

What is left untaken at the end is what nobody knew what to do with. Knows no arithmetic.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cadenza.models.adapters.layout import Layout, Site
from cadenza.models.errors import ModelError

_PREFIXES = ("base_model.model.", "base_model.", "")
_WRAPPERS = frozenset({"model", "language_model", "text_model", "transformer"})
"""Modules around a text model that one class of transformers has and another has not."""
_RENAMED = {"block_sparse_moe": "mlp"}
"""Between transformers 4 and 5."""


@dataclass(slots=True)
class Group:
    """The tensors of one module. Those that a reader understands, it takes."""

    name: str
    """In the model."""
    trained_name: str
    """As the adapter calls it, which is what its patterns are about."""
    site: Site
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By the rest of their name."""

    def take(self, rest: str) -> Tensor | None:
        return self.tensors.pop(rest, None)

    def take_pair(self, first: str, second: str) -> tuple[Tensor, Tensor] | None:
        """Both or neither; one alone is refused."""
        a, b = self.take(first), self.take(second)
        if a is None and b is None:
            return None
        if a is None or b is None:
            there, missing = (first, second) if b is None else (second, first)
            raise ModelError(f"the adapter has {self.name}.{there} and no {missing} beside it")
        return a, b

    def check_empty(self) -> None:
        for rest in self.tensors:
            raise ModelError(
                f"{self.trained_name}.{rest} is no part of an adapter that can be served: the model's "
                f"{self.name} has no use for it"
            )


def group_by_module(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Group]:
    """By the module's name. Raises `ModelError` for a tensor of a module that the model has not, or that
    could belong to several."""
    places = _Places(layout)
    groups: dict[str, Group] = {}
    for key, tensor in tensors.items():
        trained_name, name, rest = places.find(key)
        group = groups.setdefault(name, Group(name, trained_name, layout.sites[name]))
        if rest in group.tensors:
            raise ModelError(f"the adapter has two tensors for {name}.{rest}")
        group.tensors[rest] = tensor
    return groups


class _Places:
    def __init__(self, layout: Layout) -> None:
        self._names = layout.sites.keys()
        self._bare: dict[str, list[str]] = {}
        for name in self._names:
            self._bare.setdefault(_bare(name), []).append(name)

    def find(self, key: str) -> tuple[str, str, str]:
        """(the module's name in the file, in the model, and what follows it)."""
        stripped = next(key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix))
        for trained_name, rest in _splits(stripped):
            if trained_name in self._names:
                return trained_name, trained_name, rest
            found = self._bare.get(_bare(trained_name), [])
            if len(found) > 1:
                raise ModelError(f"{stripped} could belong to {found[0]} or to {found[1]} of the model")
            if found:
                return trained_name, found[0], rest
        raise ModelError(f"{stripped} belongs to no module that the model has")


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to split it at a dot, the longest first part first."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:length]), ".".join(parts[length:])


def _bare(name: str) -> str:
    """Without the modules around the text model, and with the newer of two names."""
    parts = [_RENAMED.get(part, part) for part in name.split(".")]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    return ".".join(parts)
