"""Compiles constraints beside the engine: a bounded pool of worker processes, a bounded cache, and one compilation
for concurrent equal requests.

Knows processes and caching; what a constraint means is `compile`'s to know. Its threads only wait for pipes.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cadenza.decoding.constraints.constraint import Constraint, Encode, TokenTables
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.decoding.constraints.worker_process import NoAnswer, WorkerProcess
from cadenza.decoding.request import EngineClosed, QueueFull

_NUM_WORKERS = 2
_CACHE_BYTES = 128 * 1024 * 1024
_CACHE_ENTRIES = 512
_ERROR_BYTES = 1024
_MAX_UNDER_WAY = 256


class ConstraintCompiler:
    """One per engine; safe to use from any thread."""

    def __init__(
        self,
        vocabularies: Callable[[], tuple[Vocabulary, Vocabulary]],
        encode: Encode,
        limits: Limits | None = None,
    ) -> None:
        """vocabularies: the model's, without and with its added tokens as text; called once, when first needed."""
        self._vocabularies = vocabularies
        self._encode = encode
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._cache = _Cache()
        self._under_way: dict[ConstraintSpec, Future[Constraint]] = {}
        self._threads = ThreadPoolExecutor(_NUM_WORKERS, "cadenza-constraints")
        self._own = threading.local()
        self._workers: list[WorkerProcess] = []
        self._tables: tuple[TokenTables, TokenTables] | None = None
        self._tables_lock = threading.Lock()  # making them takes long, and callers of `compile` do not wait
        self._is_closed = threading.Event()

    def compile(self, spec: ConstraintSpec) -> "Future[Constraint]":
        """The future fails with ConstraintError where the constraint cannot be enforced as asked.

        It cannot be cancelled: others may wait for it, too. EngineClosed and QueueFull are its other errors.
        """
        with self._lock:
            known = self._cache.get(spec)
            if known is not None:
                return _done(known)
            future = self._under_way.get(spec)
            if future is None:
                future = Future()
                future.set_running_or_notify_cancel()
                if self._is_closed.is_set():
                    future.set_exception(_closed())
                    return future
                if len(self._under_way) >= _MAX_UNDER_WAY:
                    future.set_exception(
                        QueueFull("too many constraints are being compiled; try again later")
                    )
                    return future
                self._under_way[spec] = future
                self._threads.submit(self._work, spec, future)
            return future

    def close(self) -> None:
        """End the workers; compilations under way fail with EngineClosed."""
        with self._lock:
            self._is_closed.set()
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=False)  # what still waits fails at once

    # on the pool's threads

    def _work(self, spec: ConstraintSpec, future: "Future[Constraint]") -> None:
        result: Constraint | BaseException
        try:
            result = self._compile(spec)
        except BaseException as error:
            result = error
        with self._lock:
            del self._under_way[spec]
            if self._is_closed.is_set():
                result = _closed()
            elif isinstance(result, Constraint | ConstraintError) and not isinstance(result, NoAnswer):
                self._cache.put(spec, result)
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _compile(self, spec: ConstraintSpec) -> Constraint:
        compiled, num_bytes = self._worker().ask(spec)
        tables = self._token_tables()[spec.kind == "structural_tag"]
        return Constraint(spec, compiled, tables, num_bytes)

    def _worker(self) -> WorkerProcess:
        """The calling thread's own."""
        worker: WorkerProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive:
            if self._is_closed.is_set():
                raise _closed()
            tables = self._token_tables()
            worker = WorkerProcess((tables[0].vocabulary, tables[1].vocabulary), self._limits)
            with self._lock:
                self._workers = [other for other in self._workers if other.is_alive] + [worker]
                is_late = self._is_closed.is_set()
            if is_late:
                worker.kill()
                raise _closed()
            self._own.worker = worker
        return worker

    def _token_tables(self) -> tuple[TokenTables, TokenTables]:
        with self._tables_lock:
            if self._tables is None:
                text, with_added = self._vocabularies()
                plain = TokenTables(text, self._encode).prepared()
                tags = plain if with_added is text else TokenTables(with_added, self._encode).prepared()
                self._tables = plain, tags
            return self._tables


class _Cache:
    """Least recently used first to go. Refusals are kept too: they cost as much as answers."""

    def __init__(self) -> None:
        self._entries: OrderedDict[ConstraintSpec, Constraint | ConstraintError] = OrderedDict()
        self._num_bytes = 0

    def get(self, spec: ConstraintSpec) -> Constraint | ConstraintError | None:
        entry = self._entries.get(spec)
        if entry is not None:
            self._entries.move_to_end(spec)
        return entry

    def put(self, spec: ConstraintSpec, entry: Constraint | ConstraintError) -> None:
        """The spec is not among the entries."""
        self._entries[spec] = _untraced(entry) if isinstance(entry, ConstraintError) else entry
        self._num_bytes += _size(spec, entry)
        while len(self._entries) > _CACHE_ENTRIES or self._num_bytes > _CACHE_BYTES:
            self._num_bytes -= _size(*self._entries.popitem(last=False))


def _size(spec: ConstraintSpec, entry: Constraint | ConstraintError) -> int:
    texts = len(spec.source) + len(spec.whitespace_pattern or "") + len(spec.name or "")
    return texts + (_ERROR_BYTES if isinstance(entry, ConstraintError) else entry.num_bytes)


def _done(entry: Constraint | ConstraintError) -> "Future[Constraint]":
    future: Future[Constraint] = Future()
    if isinstance(entry, ConstraintError):
        future.set_exception(_untraced(entry))
    else:
        future.set_result(entry)
    return future


def _untraced(error: ConstraintError) -> ConstraintError:
    """The same error again: one that is raised for every request would hold on to all of their stacks."""
    return copy.copy(error)


def _closed() -> EngineClosed:
    return EngineClosed("the engine is shutting down")
