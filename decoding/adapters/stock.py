"""What the library has and what it owes: names, memory, and the jobs that wait, with what may be done to them.

Knows no files and no threads: everything here is called under the library's lock.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cadenza.decoding.adapters.errors import AdaptersBusy, GenerationMismatch
from cadenza.decoding.adapters.memory import HostMemory
from cadenza.decoding.adapters.names import AdapterInfo, Content, Generation, Names
from cadenza.decoding.adapters.set import AdapterSet, Term
from cadenza.decoding.adapters.threads import Answer
from cadenza.decoding.adapters.waiting import Acquisition, Change, Job, WaitingList
from cadenza.decoding.request import RequestError

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter


class Stock:
    def __init__(
        self,
        changed: threading.Condition,
        capacity: int,
        wait_seconds: float,
        forget: Callable[[str], None] | None = None,
    ) -> None:
        """changed: the lock; notified whenever the loading thread may find something to do. forget: of memory."""
        self.changed = changed
        self.names = Names()
        self.memory = HostMemory(capacity, forget)
        self.waiting = WaitingList()
        self._wait_seconds = wait_seconds
        self._doomed: frozenset[str] = frozenset()
        """Digests that go as soon as their users end, since the job being served lacks room: not given to others."""

    def wake(self) -> None:
        if any(self.waiting):
            self.changed.notify_all()

    # jobs

    def add(self, job: Job) -> None:
        self.waiting.add(job)
        if not isinstance(job, Change):
            job.deadline = time.monotonic() + self._wait_seconds
        self.changed.notify_all()

    def finish(self, job: Job) -> bool:
        """It waits no longer. False: whoever asked has given up; otherwise its future is to be answered."""
        if self.waiting.is_current(job):
            self._doomed = frozenset()
        self.waiting.remove(job)
        if isinstance(job, Acquisition):
            for digest in job.claimed:
                self.memory.release(digest)
        return job.future.set_running_or_notify_cancel()

    def expire(self) -> list[Answer]:
        """Those whose time is up."""
        now = time.monotonic()
        late = [job for job in self.waiting if job.deadline is not None and job.deadline <= now]
        state = f"{self.memory.num_staying} of {self.memory.capacity} in memory are in use or pinned"
        answers: list[Answer] = []
        for job in late:
            message = (
                f"{job.question} did not get into memory within {self._wait_seconds:g} seconds ({state})"
            )
            if self.finish(job):
                answers.append((job.future, AdaptersBusy(f"{message}; try again later")))
        if late:
            self.changed.notify_all()
        return answers

    def has_room(self, job: Job) -> bool:
        """For one more. If not, it waits for those that were asked for least recently, as soon as they end."""
        claimed = job.claimed if isinstance(job, Acquisition) else ()
        num_lacking = self.memory.num_lacking(is_request=isinstance(job, Acquisition))
        self._doomed = self.memory.victims(num_lacking, claimed)
        if isinstance(job, Change):
            if not num_lacking:
                job.deadline = None
            elif job.deadline is None:
                job.deadline = time.monotonic() + self._wait_seconds
                self.changed.notify_all()
        return not num_lacking

    # requests

    def is_expected(self, names: Iterable[str]) -> bool:
        """Those of the names that stand for nothing yet are being loaded, and there are such."""
        unknown = {name for name in names if self.names.find(name) is None}
        return bool(unknown) and unknown <= {
            change.name for change in self.waiting.changes if not change.is_superseded
        }

    def acquisition(self, terms: Sequence[tuple[str, float]]) -> Acquisition:
        """As the names are now. Raises UnknownAdapter, and RequestError for more than memory holds."""
        job = Acquisition([(self.names.get(name), float(scale)) for name, scale in terms])
        self.check_fits(job)
        return job

    def check_fits(self, job: Acquisition) -> None:
        digests, capacity = job.scales.keys(), self.memory.capacity
        num_pinned = len(self.names.pinned - digests)
        if len(digests) + num_pinned > capacity:
            beside = f" beside the {num_pinned} that are pinned" if num_pinned else ""
            message = f"lora names {len(digests)} adapters; memory holds {capacity - num_pinned}{beside}"
            raise RequestError(f"{message} (--max-cpu-loras)", "lora")

    def is_there(self, job: Acquisition) -> bool:
        """All that it needs, and nothing of it is somebody else's turn."""
        doomed = frozenset() if self.waiting.is_current(job) else self._doomed
        return all(digest in self.memory and digest not in doomed for digest in job.scales)

    def grant(self, job: Acquisition) -> AdapterSet:
        held = job.generations
        for generation in held:
            generation.num_users += 1
        terms = tuple(Term(self.memory.hold(digest), scale) for digest, scale in job.scales.items())
        return AdapterSet(terms, job.names, partial(self._release, held))

    def _release(self, generations: Sequence[Generation], adapters: "Sequence[Adapter]") -> None:
        """Called without the lock, by whoever was the last to hold a set."""
        with self.changed:
            for generation in generations:
                generation.num_users -= 1
            for adapter in adapters:
                self.memory.release(adapter.digest)
            self.wake()

    def claim(self, job: Acquisition) -> None:
        """What is there stays there until the rest is: only for the one being served, so that no two wait for what
        the other has."""
        for digest in job.scales:
            if digest in self.memory and digest not in job.claimed:
                self.memory.hold(digest)
                job.claimed.add(digest)

    # names

    def check(self, change: Change) -> None:
        """Raises what keeps it from being done as things are."""
        if change.is_superseded:
            message = f"adapter {change.name!r} was unloaded while it was being loaded"
            raise GenerationMismatch(message, "lora_name", "generation_mismatch")
        if change.path is None:
            self.names.get(change.name)
        self.names.check(change.name, in_place=change.in_place, expected=change.expected)

    def publish(self, change: Change, content: Content, adapter: "Adapter") -> AdapterInfo:
        """All at once, or RequestError and nothing."""
        self.check(change)
        self.names.check_pins(change.name, content.digest, change.pin, self.memory.capacity)
        self.names.publish(change.name, content, change.pin)
        self.memory.add(adapter)
        self.memory.keep(self.names.wanted, self.names.pinned)
        return self.info(change.name)

    def remove(self, name: str) -> None:
        """What was asked to become of it goes, too."""
        self.names.remove(name)
        for change in self.waiting.changes:
            change.is_superseded = change.is_superseded or change.name == name
        self.memory.keep(self.names.wanted, self.names.pinned)

    def info(self, name: str) -> AdapterInfo:
        return self.names.info(name, is_in_memory=self.names.get(name).content.digest in self.memory)
