"""Which adapters there are, by name and generation, and which of them lie in host memory.

Publishing is atomic: a name stands for its old generation until the new one is loaded. Knows no devices and no
requests; what it hands out are `AdapterSet`s, and what it is given is a function that reads an adapter.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cadenza.decoding.adapters.set import AdapterSet

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter

Read = Callable[[str], "Adapter"]
"""The adapter at a path or Hugging Face id. Raises ModelError or AdapterRefused. Runs on the loading thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One published name, for those who ask what there is."""

    name: str
    generation: int
    """Counts up from 1 with every content that the name is given, never down; a roll-back is a new generation, too."""
    digest: str
    path: str
    """As it was given; never shown to clients."""
    base_model_name: str | None
    rank: int
    num_bytes: int
    is_pinned: bool
    is_in_memory: bool
    num_users: int
    """Requests that hold it."""
    previous_generation: int | None
    """What `roll_back` would go back to; None: nothing."""
    created: int
    """Seconds since the epoch."""


class AdapterLibrary:
    def __init__(self, read: Read, *, max_in_memory: int, wait_seconds: float = 60.0) -> None:
        """max_in_memory: adapters in host memory, those in use included; wait_seconds: how long a request waits for
        one that is being loaded."""

    def load(
        self,
        name: str,
        path: str,
        *,
        in_place: bool = False,
        expected_generation: int | None = None,
        pin: bool = False,
        base_model_name: str | None = None,
    ) -> "Future[AdapterInfo]":
        """Read the adapter on the loading thread; its name is published, all at once, when it is ready to be used.

        expected_generation: what the name must be at, now and when it is published (0: it must not exist); otherwise
        GenerationMismatch. Without it and without in_place the name must be new. Requests that run on an earlier
        generation finish on it.
        """
        raise NotImplementedError

    def unload(self, name: str, *, expected_generation: int | None = None) -> AdapterInfo:
        """Take the name away; running requests finish. Raises UnknownAdapter, GenerationMismatch."""
        raise NotImplementedError

    def roll_back(self, name: str, *, expected_generation: int | None = None) -> "Future[AdapterInfo]":
        """Publish the content of the generation before, as a new generation."""
        raise NotImplementedError

    def acquire(self, terms: Sequence[tuple[str, float]]) -> "Future[AdapterSet]":
        """The adapters of these names at these scales, as they are published now, in host memory until the set is
        released. Raises UnknownAdapter at once; the future fails with AdaptersBusy, or with AdapterRefused if the files
        have changed since they were loaded. terms: may be empty or repeat a name, whose scales add up."""
        raise NotImplementedError

    def list(self) -> "list[AdapterInfo]":
        raise NotImplementedError

    def close(self) -> None:
        """End the loading thread; what waits fails with EngineClosed."""
        raise NotImplementedError
