"""What the loading thread does: serves the job whose turn it is, reading adapters without the lock.

Knows how an adapter is read only by the function it is given.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cadenza.decoding.adapters.errors import AdapterRefused, PathNotAllowed
from cadenza.decoding.adapters.names import Content, Generation
from cadenza.decoding.adapters.stock import Stock
from cadenza.decoding.adapters.threads import Answer, deliver
from cadenza.decoding.adapters.waiting import Acquisition, Change, Expectation
from cadenza.decoding.request import RequestError
from cadenza.models.adapters.locate import AdapterPathError
from cadenza.models.errors import ModelError

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter

Read = Callable[[str], "Adapter"]
"""The adapter at a path or Hugging Face id. Raises ModelError or AdapterRefused. Runs on the loading thread."""
Warm = Callable[["Adapter"], None]


class Loading:
    def __init__(self, stock: Stock, read: Read, warm: Warm | None) -> None:
        self._stock, self._read, self._warm = stock, read, warm

    def next_work(self) -> Callable[[], None] | None:
        """Under the lock; what it returns is called without it. None: there is nothing to do, for now."""
        if answers := self._settled():
            return partial(deliver, answers)
        job = self._stock.waiting.current
        if job is None:
            return None
        if isinstance(job, Change):
            return self._start_change(job)
        self._stock.claim(job)
        missing = next(each for each in job.generations if each.content.digest not in self._stock.memory)
        return partial(self._read_again, job, missing) if self._stock.has_room(job) else None

    def _settled(self) -> list[Answer]:
        """Requests whose adapters are all there by now; those that were given up are forgotten."""
        stock = self._stock
        for job in list(stock.waiting):
            if job.future.cancelled():
                stock.finish(job)
        answers: list[Answer] = []
        for expecting in list(stock.waiting.expectations):
            if not stock.is_expected(name for name, _ in expecting.terms):
                answers += self._resolved(expecting)
        for request in list(stock.waiting.requests):
            if stock.is_there(request):
                granted = stock.grant(request)  # before its claims go
                if stock.finish(request):
                    answers.append((request.future, granted))
                else:
                    granted.release()
        return answers

    # requests

    def _resolved(self, expecting: Expectation) -> list[Answer]:
        """The names are there now, or will not be."""
        stock = self._stock
        try:
            request = stock.acquisition(expecting.terms)
        except RequestError as error:
            return [(expecting.future, error)] if stock.finish(expecting) else []
        request.future, request.deadline = expecting.future, expecting.deadline
        stock.waiting.remove(expecting)
        stock.waiting.add(request)
        return []

    def _read_again(self, job: Acquisition, missing: Generation) -> None:
        outcome: Adapter | Exception
        try:
            outcome = self._fetch(missing.name, missing.content.path, missing.content.digest)
        except Exception as error:  # whatever it is, it is for those who asked
            outcome = error
        answers: list[Answer] = []
        stock = self._stock
        with stock.changed:
            if isinstance(outcome, Exception):
                answers = self._failed(missing.content, outcome)
            else:
                stock.memory.add(outcome)
                if stock.waiting.is_current(job):
                    stock.claim(job)
                stock.memory.trim()
        deliver(answers)

    def _failed(self, content: Content, error: Exception) -> list[Answer]:
        """Under the lock. Of everyone who waits for this content: a later generation of the name, or the error."""
        answers: list[Answer] = []
        for job in list(self._stock.waiting.requests):
            if not any(content.is_same_read(generation.content) for generation in job.generations):
                continue
            if (refusal := self._advance(job, content, error)) and self._stock.finish(job):
                answers.append((job.future, refusal))
        return answers

    def _advance(self, job: Acquisition, failed: Content, error: Exception) -> Exception | None:
        terms = []
        for generation, scale in job.terms:
            current: Generation | None = generation
            if generation.content.is_same_read(failed):
                current = self._stock.names.find(generation.name)
            if current is None or current.content.is_same_read(failed):
                return error
            terms.append((current, scale))
        job.resolve(terms)
        try:
            self._stock.check_fits(job)
        except RequestError as refusal:
            return refusal
        return None

    # changes

    def _start_change(self, change: Change) -> Callable[[], None] | None:
        stock = self._stock
        try:
            stock.check(change)
            before = stock.names.previous(change.name).content if change.path is None else None
        except RequestError as error:
            return partial(deliver, [(change.future, error)] if stock.finish(change) else [])
        adapter = None if before is None else stock.memory.find(before.digest)
        if before is not None and adapter is not None:
            return partial(deliver, self._conclude(change, before, adapter))
        return partial(self._read_and_publish, change, before) if stock.has_room(change) else None

    def _read_and_publish(self, change: Change, before: Content | None) -> None:
        """before: what it is rolled back to."""
        stock = self._stock
        try:
            adapter, content = self._read_for(change, before)
        except Exception as error:
            with stock.changed:
                is_answered = stock.waiting.is_current(change) and stock.finish(change)
            deliver([(change.future, error)] if is_answered else [])
            return
        with stock.changed:
            answers = self._conclude(change, content, adapter) if stock.waiting.is_current(change) else []
            stock.memory.dismiss(adapter.digest)  # if it was warmed for nothing
        deliver(answers)

    def _read_for(self, change: Change, before: Content | None) -> "tuple[Adapter, Content]":
        path, digest = (change.path, None) if before is None else (before.path, before.digest)
        assert path is not None
        adapter = self._fetch(change.name, path, digest)
        with self._stock.changed:
            adapter = self._stock.memory.find(adapter.digest) or adapter
        if self._warm is not None:
            self._warm(adapter)
        return adapter, before or Content.of(adapter, path, change.base_model_name)

    def _conclude(self, change: Change, content: Content, adapter: "Adapter") -> list[Answer]:
        """Under the lock."""
        if not self._stock.finish(change):
            return []
        try:
            return [(change.future, self._stock.publish(change, content, adapter))]
        except RequestError as error:
            return [(change.future, error)]

    def _fetch(self, name: str, path: str, digest: str | None) -> "Adapter":
        """digest: what it must be, where it was read before."""
        again = (
            "" if digest is None else f"adapter {name!r} is in memory no more and could not be read again: "
        )
        try:
            adapter = self._read(path)
        except AdapterPathError as error:
            raise PathNotAllowed(f"{again}{error}", "lora_path") from error
        except ModelError as error:
            raise AdapterRefused(f"{again}{error}", "lora_path") from error
        if digest not in (None, adapter.digest):
            message = f"the files of adapter {name!r} have changed since it was loaded; load it again"
            raise AdapterRefused(message, "lora_name", "adapter_changed")
        return adapter
