"""Which adapters there are, by name and generation, and which of them lie in host memory.

Publishing is atomic: a name stands for its old generation until the new one is loaded. Knows no devices and no
requests; what it hands out are `AdapterSet`s, and what it is given is a function that reads an adapter.

Memory and names change under one lock, under which nothing is read and nobody's future is answered. An adapter that
memory has let go of is read again from where it came from when it is asked for, and refused if it is another by then.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from cadenza.decoding.adapters.loading import Loading, Read, Warm
from cadenza.decoding.adapters.names import AdapterInfo
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.adapters.stock import Stock
from cadenza.decoding.adapters.threads import Answer, LoadingThreads, deliver
from cadenza.decoding.adapters.waiting import Change, Expectation, Job
from cadenza.decoding.request import EngineClosed

__all__ = ["AdapterInfo", "AdapterLibrary", "Read", "Warm"]


class AdapterLibrary:
    """Safe on any thread. A future that is cancelled gives up the wait: nothing is loaded for it, nothing held."""

    def __init__(
        self,
        read: Read,
        *,
        max_in_memory: int,
        wait_seconds: float = 60.0,
        warm: Warm | None = None,
        forget: Callable[[str], None] | None = None,
    ) -> None:
        """max_in_memory: adapters in host memory, those in use included; beside them lies at most one that is being
        read, or was just published while all others were in use. wait_seconds: how long a request waits for adapters
        that are being loaded, and anything for room. warm: called on the loading thread with an adapter that was read
        for a name, before the name stands for it. forget: called with the digest of what no name stands for any more
        and no request uses, under the lock: it must not wait."""
        if max_in_memory < 1:
            raise ValueError(f"max_in_memory must be at least 1, got {max_in_memory}")
        self._changed = threading.Condition()
        self._stock = Stock(self._changed, max_in_memory, wait_seconds, forget)
        self._is_closed = False
        self._threads = LoadingThreads(
            self._changed,
            next_work=Loading(self._stock, read, warm).next_work,
            expire=self._stock.expire,
            next_deadline=lambda: self._stock.waiting.next_deadline,
            is_closed=lambda: self._is_closed,
        )

    def load(
        self,
        name: str,
        path: str,
        *,
        in_place: bool = False,
        expected_generation: int | None = None,
        pin: bool | None = None,
        base_model_name: str | None = None,
    ) -> "Future[AdapterInfo]":
        """Read the adapter on the loading thread; its name is published, all at once, when it is ready to be used.

        expected_generation: what the name must be at, now and when it is published (0: it must not exist); otherwise
        GenerationMismatch, at once or by the future. Without it and without in_place the name must be new. Requests
        that run on an earlier generation finish on it. Loads are done in the order in which they were asked for, so the
        last one wins; an unload takes with it what was asked before. pin: keep it in memory; None: as the name was.
        The future fails with AdapterRefused or PathNotAllowed, or AdaptersBusy where there was no room; then all is as
        it was.
        """
        change = Change(
            name=name,
            path=path,
            in_place=in_place,
            expected=expected_generation,
            pin=pin,
            base_model_name=base_model_name,
        )
        with self._changed:
            self._require_open()
            self._stock.check(change)
            self._enqueue(change)
        return change.future

    def unload(self, name: str, *, expected_generation: int | None = None) -> AdapterInfo:
        """Take the name away; running requests finish. Raises UnknownAdapter, GenerationMismatch."""
        with self._changed:
            self._require_open()
            self._stock.names.get(name)
            self._stock.names.check(name, in_place=True, expected=expected_generation)
            info = self._stock.info(name)
            self._stock.remove(name)
            self._stock.wake()
        return info

    def roll_back(self, name: str, *, expected_generation: int | None = None) -> "Future[AdapterInfo]":
        """Publish the content that the name had before, as a new generation; rolled back twice, it is where it was.

        Only one content is kept, the last that differs: loading the same one twice does not lose it. Raises
        UnknownAdapter, and GenerationMismatch where there is none, too. Done at once where the content is in memory and
        no load of the name is under way; otherwise in turn, and the future fails with AdapterRefused if memory has let
        go of the content and its files have changed since.
        """
        change = Change(name=name, path=None, in_place=True, expected=expected_generation)
        with self._changed:
            self._require_open()
            self._stock.check(change)
            adapter = None
            if not any(other.name == name for other in self._stock.waiting.changes):
                content = self._stock.names.previous(name).content
                adapter = self._stock.memory.find(content.digest)
            if adapter is None:
                self._enqueue(change)
            else:
                change.future.set_result(self._stock.publish(change, content, adapter))
                self._stock.wake()
        return change.future

    def acquire(self, terms: Sequence[tuple[str, float]]) -> "Future[AdapterSet]":
        """The adapters of these names at these scales, as they are published now, in host memory until the set is
        released. A name that is being loaded for the first time is waited for. Raises UnknownAdapter, and RequestError
        for more than memory holds, at once if that is known; the future may also fail with AdaptersBusy, or with
        AdapterRefused if the files have changed since they were loaded. terms: may be empty or repeat a name, whose
        scales add up.

        Where all are in memory the future is done. Otherwise first come, first served; if files have changed while it
        waited and the name stands for a later generation by then, it is given that one.
        """
        with self._changed:
            self._require_open()
            if self._stock.is_expected(name for name, _ in terms):
                expecting = Expectation(list(terms))
                self._enqueue(expecting)
                return expecting.future
            job = self._stock.acquisition(terms)
            if self._stock.is_there(job):
                job.future.set_result(self._stock.grant(job))
            else:
                self._enqueue(job)
        return job.future

    def list(self) -> "list[AdapterInfo]":
        """In the order in which the names came."""
        with self._changed:
            return [self._stock.info(name) for name in self._stock.names]

    def close(self) -> None:
        """End the threads; what waits fails with EngineClosed. Sets that are held stay what they are."""
        closed = EngineClosed("the engine is shutting down")
        with self._changed:
            self._is_closed = True
            jobs = list(self._stock.waiting)
            answers: list[Answer] = [(job.future, closed) for job in jobs if self._stock.finish(job)]
            self._changed.notify_all()
        deliver(answers)
        self._threads.join()

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the engine is shutting down")

    def _enqueue(self, job: Job) -> None:
        self._stock.add(job)
        job.future.add_done_callback(self._answered)
        self._threads.start()

    def _answered(self, future: "Future[AdapterInfo] | Future[AdapterSet]") -> None:
        """Without the lock."""
        if future.cancelled():
            with self._changed:
                self._stock.wake()
