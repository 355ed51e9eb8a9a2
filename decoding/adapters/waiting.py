"""What waits for the loading thread: requests for adapters that are not in memory, and changes of names.

Knows no lock and no thread: whoever has it holds a lock.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cadenza.decoding.adapters.names import AdapterInfo, Generation
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.request import RequestError


@dataclass(slots=True, eq=False)
class Acquisition:
    """A request for adapters, as their names were resolved."""

    terms: list[tuple[Generation, float]]
    deadline: float | None = None
    """By `time.monotonic`."""
    future: "Future[AdapterSet]" = field(default_factory=Future)
    claimed: set[str] = field(default_factory=set)
    """Digests that it holds while it waits for the rest."""
    scales: dict[str, float] = field(init=False)
    """By digest, in order; what adds up to 0 is not needed."""

    def __post_init__(self) -> None:
        if not math.isfinite(sum(abs(scale) for _, scale in self.terms)):
            raise RequestError("the scales of adapters must be finite numbers, their sum too", "lora")
        self.resolve(self.terms)

    def resolve(self, terms: list[tuple[Generation, float]]) -> None:
        """The sums do not depend on the order of the terms."""
        parts: dict[str, list[float]] = {}
        for generation, scale in terms:
            parts.setdefault(generation.content.digest, []).append(scale)
        sums = {digest: math.fsum(parts[digest]) for digest in sorted(parts)}
        self.terms, self.scales = terms, {digest: scale for digest, scale in sums.items() if scale}

    @property
    def generations(self) -> list[Generation]:
        """Those needed, each once."""
        found = {id(each): each for each, _ in self.terms if each.content.digest in self.scales}
        return list(found.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(generation.name for generation, _ in self.terms))

    @property
    def question(self) -> str:
        """What it waits for, in words."""
        names = [repr(generation.name) for generation in self.generations]
        return f"adapter{'s' if len(names) > 1 else ''} {', '.join(names)}"


@dataclass(slots=True, eq=False, kw_only=True)
class Change:
    """A name that is to be given a content: that of a path, or the one it had before."""

    name: str
    path: str | None
    """None: roll back."""
    in_place: bool
    expected: int | None
    pin: bool | None = None
    base_model_name: str | None = None
    deadline: float | None = None
    """While it waits for room."""
    future: "Future[AdapterInfo]" = field(default_factory=Future)
    is_superseded: bool = False
    """The name was unloaded after this was asked."""

    @property
    def question(self) -> str:
        return f"adapter {self.name!r}"


@dataclass(slots=True, eq=False)
class Expectation:
    """A request for adapters of which some have not been loaded yet, but are going to be; then it is an Acquisition."""

    terms: list[tuple[str, float]]
    deadline: float | None = None
    """By `time.monotonic`."""
    future: "Future[AdapterSet]" = field(default_factory=Future)

    @property
    def question(self) -> str:
        names = [repr(name) for name in dict.fromkeys(name for name, _ in self.terms)]
        return f"adapter{'s' if len(names) > 1 else ''} {', '.join(names)}"


Served = Acquisition | Change
Job = Served | Expectation


class WaitingList:
    """Two queues, each served first come first served; where both wait they take turns, so that a burst of loads does
    not use up the time of requests, nor requests that of loads."""

    def __init__(self) -> None:
        self.requests: deque[Acquisition] = deque()
        self.changes: deque[Change] = deque()
        self.expectations: deque[Expectation] = deque()
        """Not served themselves: they wait for changes."""
        self._current: Served | None = None
        self._is_turn_of_changes = False

    def __iter__(self) -> Iterator[Job]:
        yield from self.requests
        yield from self.changes
        yield from self.expectations

    def add(self, job: Job) -> None:
        match job:
            case Acquisition():
                self.requests.append(job)
            case Change():
                self.changes.append(job)
            case Expectation():
                self.expectations.append(job)

    @property
    def current(self) -> Served | None:
        """The one that is served now, until it is removed."""
        if self._current is None:
            heads: Sequence[Served] = [*list(self.requests)[:1], *list(self.changes)[:1]]
            if heads:
                self._current = heads[-1 if self._is_turn_of_changes else 0]
        return self._current

    def is_current(self, job: Job) -> bool:
        return job is self._current

    def remove(self, job: Job) -> None:
        match job:
            case Acquisition():
                self.requests.remove(job)
            case Change():
                self.changes.remove(job)
            case Expectation():
                self.expectations.remove(job)
        if job is self._current:
            self._current = None
            self._is_turn_of_changes = isinstance(job, Acquisition)

    @property
    def next_deadline(self) -> float | None:
        return min((job.deadline for job in self if job.deadline is not None), default=None)
