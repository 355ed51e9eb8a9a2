"""The way back from the engine's thread to whoever asked: a queue that a thread or an event loop can wait on.

Delivery never blocks the engine: events pile up here if nobody reads them.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from cadenza.decoding.request import Event

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


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
        self._waiter: Waiter | None = None

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

    def put(self, events: Iterable[Event], *, is_last: bool = False) -> None:
        """Add events. Whoever awaits them is only woken by `wake`, which the engine calls once per step."""
        with self._changed:
            self._events.extend(events)
            self._is_closed = self._is_closed or is_last
            self._changed.notify_all()

    def close(self, error: Exception | None = None) -> None:
        """No more events; the first call decides how iteration ends."""
        with self._changed:
            if not self._is_closed:
                self._is_closed, self._error = True, error
            self._changed.notify_all()
        wake([self])

    def _take_waiter(self) -> "Waiter | None":
        with self._changed:
            waiter, self._waiter = self._waiter, None
            return waiter

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


def wake(streams: Iterable[RequestStream]) -> None:
    """Wake who awaits these streams: once per event loop, which then works in one go while the engine computes."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream in streams:
        if (waiter := stream._take_waiter()) is not None:
            by_loop.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed before its request was
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: "list[asyncio.Future[None]]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
