"""The end of a server: what runs may finish in time; what does not is told so inside its stream."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from cadenza.decoding.request import Delta, EngineClosed, Event
from cadenza.server.http_server import DrainingServer
from cadenza.server.service import Service


class EndlessStream:
    """Says one thing, then nothing until the engine closes."""

    def __init__(self, engine: "EndlessEngine", first: list[Event]) -> None:
        self._engine = engine
        self._first = first

    def abort(self) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._first:
            yield event
        await asyncio.to_thread(self._engine.closed.wait)
        raise EngineClosed("the engine is shutting down")


class EndlessEngine:
    """The scripted engine, with answers that never end by themselves."""

    def __init__(self, scripted: Any) -> None:
        self._scripted = scripted
        self.closed = threading.Event()
        self.timeouts: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scripted, name)

    def submit(self, request: Any) -> EndlessStream:
        return EndlessStream(self, [self._scripted.prompt_done(request), Delta(0, "so far", (1,))])

    def close(self, timeout: float = 0.0) -> None:
        self.timeouts.append(timeout)
        self.closed.set()


@pytest.fixture
def endless(engine: Any) -> EndlessEngine:
    return EndlessEngine(engine)


@pytest.fixture
def running(endless: EndlessEngine) -> Iterator[tuple[DrainingServer, str, threading.Thread]]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = DrainingServer(Service(loaded=endless), drain_timeout=0.25)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield server, f"http://127.0.0.1:{listener.getsockname()[1]}", thread
    server.stop()
    endless.closed.set()
    thread.join(timeout=30)


def test_what_outlasts_the_timeout_ends_with_an_error_event(
    running: tuple[DrainingServer, str, threading.Thread], endless: EndlessEngine
) -> None:
    server, url, thread = running
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}, timeout=30
    ) as response:
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "so far"
        server.drain()
        error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_closed"
    assert done == "data: [DONE]"
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert endless.timeouts == [0.25]
