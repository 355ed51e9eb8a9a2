"""The engine requests behind one HTTP request: submitted together, read as one stream, aborted together.

It knows nothing of wire formats: in go `GenerationRequest`s, out come the engine's events.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from cadenza.decoding.request import Event, GenerationRequest
from cadenza.server.metrics import RequestTimer, ServerMetrics

if TYPE_CHECKING:
    from cadenza.decoding import Engine, RequestStream


class Generation:
    """Raises on construction what the engine raises on submission; then nothing stays submitted."""

    def __init__(
        self, engine: "Engine", requests: Sequence[GenerationRequest], metrics: ServerMetrics
    ) -> None:
        self._metrics = metrics
        self._streams: list[RequestStream] = []
        try:
            for request in requests:
                self._streams.append(engine.submit(request))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Free what the engine still holds for us. Harmless at any time, also after the end."""
        for stream in self._streams:
            stream.abort()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the prompt, event), in the order in which the engine produces them."""
        if len(self._streams) == 1:
            async for event in self._timed(self._streams[0]):
                yield 0, event
        else:
            async for item in self._merged():
                yield item

    async def _timed(self, stream: "RequestStream") -> AsyncIterator[Event]:
        timer = RequestTimer(self._metrics)
        async for event in stream:
            timer.observe(event)
            yield event
        timer.finish()

    async def _merged(self) -> AsyncIterator[tuple[int, Event]]:
        inbox: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def pump(index: int, stream: "RequestStream") -> None:
            try:
                async for event in self._timed(stream):
                    inbox.put_nowait((index, event))
                inbox.put_nowait((index, None))
            except Exception as error:
                inbox.put_nowait((index, error))

        pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(self._streams)]
        try:
            unfinished = len(pumps)
            while unfinished:
                index, item = await inbox.get()
                if item is None:
                    unfinished -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield index, item
        finally:
            for task in pumps:
                task.cancel()
