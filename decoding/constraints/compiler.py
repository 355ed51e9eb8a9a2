"""Compiles constraints beside the engine: a bounded pool of worker processes, a bounded cache, and one compilation
for concurrent equal requests.

Knows processes and caching; what a constraint means is `compile`'s to know. Its threads only wait for pipes.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cadenza.decoding.constraints.constraint import Constraint, Encode, TokenTables
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.decoding.constraints.worker_process import WorkerProcess

_NUM_WORKERS = 2
_CACHE_BYTES = 128 * 1024 * 1024
_CACHE_ENTRIES = 512
_ERROR_BYTES = 1024


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
        self._closed = False

    def compile(self, spec: ConstraintSpec) -> "Future[Constraint]":
        """The future fails with ConstraintError where the constraint cannot be enforced as asked."""
        with self._lock:
            known = self._cache.get(spec)
            if known is not None:
                return _done(known)
            if spec not in self._under_way:
                self._under_way[spec] = self._threads.submit(self._compile, spec)
            return self._under_way[spec]

    def close(self) -> None:
        """End the workers; compilations under way fail."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, []
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()

    # on the pool's threads

    def _compile(self, spec: ConstraintSpec) -> Constraint:
        result: Constraint | ConstraintError | None = None
        try:
            compiled, num_bytes = self._worker().ask(spec)
            tables = self._token_tables()[spec.kind == "structural_tag"]
            result = Constraint(spec, compiled, tables, num_bytes)
            return result
        except ConstraintError as error:
            result = error
            raise
        finally:
            with self._lock:
                del self._under_way[spec]
                if result is not None:
                    self._cache.put(spec, result)

    def _worker(self) -> WorkerProcess:
        worker: WorkerProcess | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive:
            tables = self._token_tables()
            worker = WorkerProcess((tables[0].vocabulary, tables[1].vocabulary), self._limits)
            with self._lock:
                self._workers = [other for other in self._workers if other.is_alive] + [worker]
                if self._closed:
                    worker.kill()
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
        self._entries[spec] = entry
        self._num_bytes += _size(spec, entry)
        while len(self._entries) > _CACHE_ENTRIES or self._num_bytes > _CACHE_BYTES:
            self._num_bytes -= _size(*self._entries.popitem(last=False))


def _size(spec: ConstraintSpec, entry: Constraint | ConstraintError) -> int:
    return len(spec.source) + (_ERROR_BYTES if isinstance(entry, ConstraintError) else entry.num_bytes)


def _done(entry: Constraint | ConstraintError) -> "Future[Constraint]":
    future: Future[Constraint] = Future()
    if isinstance(entry, ConstraintError):
        future.set_exception(entry)
    else:
        future.set_result(entry)
    return future
