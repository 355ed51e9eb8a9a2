"""What each adapter's name stands for, now and before. Knows no tensors and no threads: whoever has it holds a lock."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cadenza.decoding.adapters.errors import AdapterRefused, GenerationMismatch, UnknownAdapter

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter


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
    """Requests that hold this generation."""
    previous_generation: int | None
    """What `roll_back` would go back to; None: nothing."""
    created: int
    """When this generation was published, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is known of an adapter that may or may not be in memory, and where to read it again."""

    digest: str
    path: str
    base_model_name: str | None
    rank: int
    num_bytes: int

    @classmethod
    def of(cls, adapter: "Adapter", path: str, base_model_name: str | None) -> "Content":
        return cls(
            digest=adapter.digest,
            path=path,
            base_model_name=base_model_name or adapter.base_model_name,
            rank=adapter.rank,
            num_bytes=adapter.num_bytes,
        )

    def is_same_read(self, other: "Content") -> bool:
        """What reading one of them says holds for the other."""
        return (self.digest, self.path) == (other.digest, other.path)


@dataclass(slots=True, eq=False)
class Generation:
    """One content of one name. Never changes but for the count of its users."""

    name: str
    number: int
    content: Content
    created: int = field(default_factory=lambda: int(time.time()))
    num_users: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    current: Generation
    previous: Generation | None
    """The last one whose content was another."""
    is_pinned: bool


class Names:
    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._last_numbers: dict[str, int] = {}
        """Of every name that there ever was: numbers are not given twice, not even after an unload."""
        self.wanted: frozenset[str] = frozenset()
        """Digests that a name stands for, or could be rolled back to."""
        self.pinned: frozenset[str] = frozenset()
        """Digests that a pinned name stands for."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def find(self, name: str) -> Generation | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.current

    def get(self, name: str) -> Generation:
        if (found := self.find(name)) is None:
            raise UnknownAdapter(f"there is no adapter {name!r}", code="model_not_found")
        return found

    def previous(self, name: str) -> Generation:
        self.get(name)
        if (previous := self._entries[name].previous) is None:
            message = f"adapter {name!r} has no generation before the one that is published, to go back to"
            raise GenerationMismatch(message, "lora_name", "no_previous_generation")
        return previous

    def check(self, name: str, *, in_place: bool, expected: int | None) -> None:
        """Raises GenerationMismatch if the name is not as whoever wants to change it expects."""
        current = self.find(name)
        number = 0 if current is None else current.number
        if expected is None and current is not None and not in_place:
            message = (
                f"adapter {name!r} is loaded already, at generation {number}; replace it in place (load_inplace) or "
                "unload it first"
            )
            raise GenerationMismatch(message, "lora_name", "adapter_exists")
        if expected is not None and number != expected:
            state = (
                f"adapter {name!r} is at generation {number}" if number else f"there is no adapter {name!r}"
            )
            wanted = f"generation {expected} was expected" if expected else "it was expected not to exist"
            raise GenerationMismatch(f"{state}, but {wanted}", "expected_generation", "generation_mismatch")

    def check_pins(self, name: str, digest: str, pin: bool | None, capacity: int) -> None:
        """Raises AdapterRefused if, with this content under this name, adapters were pinned that do not fit, or left
        no room for those that are not."""
        entry = self._entries.get(name)
        others = [other for key, other in self._entries.items() if key != name]
        pinned = {other.current.content.digest for other in others if other.is_pinned}
        rest = {other.current.content.digest for other in others if not other.is_pinned}
        (pinned if _is_pinned(entry, pin) else rest).add(digest)
        rest -= pinned
        if len(pinned) + bool(rest) > capacity:
            message = (
                f"adapter {name!r} does not fit: with it, {len(pinned)} adapters would be pinned and {len(rest)} not, "
                f"and memory holds {capacity} (--max-cpu-loras)"
            )
            raise AdapterRefused(message, "lora_name", "adapters_pinned")

    def publish(self, name: str, content: Content, pin: bool | None = None) -> Generation:
        """pin None: as the name was before."""
        entry = self._entries.get(name)
        number = self._last_numbers[name] = self._last_numbers.get(name, 0) + 1
        generation = Generation(name, number, content)
        previous = None
        if entry is not None:
            is_same = entry.current.content.digest == content.digest
            previous = entry.previous if is_same else entry.current
        self._entries[name] = _Entry(generation, previous, _is_pinned(entry, pin))
        self._count()
        return generation

    def remove(self, name: str) -> None:
        del self._entries[name]
        self._count()

    def info(self, name: str, *, is_in_memory: bool) -> AdapterInfo:
        entry = self._entries[name]
        current, content = entry.current, entry.current.content
        return AdapterInfo(
            name=name,
            generation=current.number,
            digest=content.digest,
            path=content.path,
            base_model_name=content.base_model_name,
            rank=content.rank,
            num_bytes=content.num_bytes,
            is_pinned=entry.is_pinned,
            is_in_memory=is_in_memory,
            num_users=current.num_users,
            previous_generation=None if entry.previous is None else entry.previous.number,
            created=current.created,
        )

    def _count(self) -> None:
        entries = self._entries.values()
        shown = [
            generation for entry in entries for generation in (entry.current, entry.previous) if generation
        ]
        self.wanted = frozenset(generation.content.digest for generation in shown)
        self.pinned = frozenset(entry.current.content.digest for entry in entries if entry.is_pinned)


def _is_pinned(entry: _Entry | None, pin: bool | None) -> bool:
    return (entry is not None and entry.is_pinned) if pin is None else pin
