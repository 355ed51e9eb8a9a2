"""An adapter that is there from the start, as the command line or a script names it. Knows no files and no tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

from cadenza.models.errors import ModelError

MAX_NAME_LENGTH = 255


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as the name of an adapter; None: nothing. A colon parts base and adapter in a request's
    `model`, a comma the names in a metric's label."""
    if not name:
        return "an adapter's name must not be empty"
    if len(name) > MAX_NAME_LENGTH:
        return f"an adapter's name has at most {MAX_NAME_LENGTH} characters, got {len(name)}"
    bad = next((each for each in name if each in ":," or each.isspace() or not each.isprintable()), None)
    if bad is not None:
        return f"an adapter's name holds no spaces, colons, commas or control characters, got {name!r}"
    return None


@dataclass(frozen=True, slots=True)
class LoraModule:
    """Raises ModelError where the name cannot be one, or the path is empty."""

    name: str
    """What requests call it."""
    path: str
    """A local folder or a Hugging Face id."""
    base_model_name: str | None = None
    """Told to clients as what it belongs to; None: the served model."""

    def __post_init__(self) -> None:
        fault = name_fault(self.name)
        if fault is not None:
            raise ModelError(fault)
        if not self.path:
            raise ModelError(f"the adapter {self.name} has an empty path")


def first_duplicate(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
