"""The way back from the engine's thread to whoever asked: a queue that a thread or an event loop can wait on.

Delivery never blocks the engine: events pile up here if nobody reads them.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from cadenza.decoding.request import Event


class RequestStream:
    """The events of one request, iterated once, either with `for` or with `async for`.

    Iteration raises `RequestFailed` or `EngineClosed` where the engine could not go on. After `abort` it ends.
    """

    def __init__(self, request_id: str, abort: Callable[["RequestStream"], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._events: deque[Event] = deque()
        self._error: Exception | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def abort(self) -> None:
        """Stop the request and free what it holds. From any thread, any number of times."""
        if not self._is_closed:
            self.close()
            self._abort(self)

    @property
    def is_closed(self) -> bool:
        """No more events will come; some may still be unread."""
        return self._is_closed

    # what the engine's thread calls

    def put(self, events: Iterable[Event]) -> None:
        with self._changed:
            self._events.extend(events)
            self._wake()

    def close(self, error: Exception | None = None) -> None:
        """No more events; the first call decides how iteration ends."""
        with self._changed:
            if not self._is_closed:
                self._is_closed, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            loop, future = self._waiter
            self._waiter = None
            with contextlib.suppress(RuntimeError):  # the loop was closed before its request was
                loop.call_soon_threadsafe(_resolve, future)

    # what the consumer calls

    def _take(self) -> Event | None:
        """The next event, or None if there is none yet; the lock is held. Raises at the end."""
        if self._events:
            return self._events.popleft()
        if not self._is_closed:
            return None
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._changed:
            while (event := self._take()) is None:
                self._changed.wait()
        return event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._changed:
                try:
                    event = self._take()
                except StopIteration:
                    raise StopAsyncIteration from None
                if event is not None:
                    return event
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = (loop, future)
            await future


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
