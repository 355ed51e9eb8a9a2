"""The threads of the library: one reads adapters, one minds deadlines, since a read may hang. Know nothing of either.

Both start when they are first needed and wait on the library's condition; neither polls.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from cadenza.decoding.request import RequestError

Answer = tuple["Future[Any]", Any]
"""A future that runs, and its result or exception: for whoever holds no lock to give."""

_JOIN_SECONDS = 5.0
_LONGEST_WAIT = 3600.0


def deliver(answers: Iterable[Answer]) -> None:
    for future, outcome in answers:
        if isinstance(outcome, BaseException):
            if isinstance(outcome, RequestError):
                _forget_frames(outcome)
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _forget_frames(refusal: BaseException) -> None:
    """What a refusal says is in its line; the frames that it came through would keep what was read alive, in a cycle
    by the future that has the refusal."""
    link: BaseException | None = refusal
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


class LoadingThreads:
    """All that it calls but the work itself is called under the lock of `changed`, which is notified whenever the
    answers may be others."""

    def __init__(
        self,
        changed: threading.Condition,
        *,
        next_work: Callable[[], Callable[[], None] | None],
        expire: Callable[[], list[Answer]],
        next_deadline: Callable[[], float | None],
        is_closed: Callable[[], bool],
    ) -> None:
        self._changed = changed
        self._next_work, self._is_closed = next_work, is_closed
        self._expire, self._next_deadline = expire, next_deadline
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        if not self._threads:
            self._start("cadenza-adapters", self._load)
            self._start("cadenza-adapters-clock", self._mind_deadlines)

    def join(self) -> None:
        """Not for longer than a few seconds: a read cannot be interrupted."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)

    def _start(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _load(self) -> None:
        while self._work():
            pass

    def _work(self) -> bool:
        """A call of its own each time: while it waits, the thread keeps no adapter alive."""
        with self._changed:
            while (work := self._next_work()) is None:
                if self._is_closed():
                    return False
                self._changed.wait()
        work()
        return True

    def _mind_deadlines(self) -> None:
        while True:
            with self._changed:
                while not (answers := self._expire()):
                    if self._is_closed():
                        return
                    deadline = self._next_deadline()
                    seconds = None if deadline is None else deadline - time.monotonic()
                    self._changed.wait(None if seconds is None else min(max(seconds, 0.0), _LONGEST_WAIT))
            deliver(answers)
