"""Sends an answer: as a stream of events or whole, aborting the generation when the client leaves."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from cadenza.server.answers.answer import Answer, Chunk
from cadenza.server.errors import describe
from cadenza.server.generation import Generation

logger = logging.getLogger("cadenza.server")

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; nginx's number for an answer to a client that has left."""


class EventStream(EventSourceResponse):
    """Server-sent events that end the generation with the response, however the response ends."""

    def __init__(self, content: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(content, sep="\n")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


async def respond(
    request: Request, generation: Generation, answer: Answer, *, stream: bool, usage_chunks: bool
) -> Response:
    chunks = answer.chunks(generation.events())
    if stream:
        return EventStream(_server_sent(chunks, usage_chunks=usage_chunks), generation)
    try:
        whole = await _unless_disconnected(request, answer.fold(chunks))
    finally:
        generation.abort()
    if whole is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(to_json(whole), media_type="application/json")


async def _server_sent(chunks: AsyncIterator[Chunk], *, usage_chunks: bool) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            if not usage_chunks:
                del chunk["usage"]
                if not chunk["choices"]:
                    continue
            yield b"data: " + to_json(chunk) + b"\n\n"
    except Exception as error:
        described = describe(error)
        if described.status == 500:
            logger.error("a stream failed", exc_info=error)
        yield b"data: " + to_json(described.body) + b"\n\n"
    yield DONE


async def _unless_disconnected(request: Request, work: Any) -> dict[str, Any] | None:
    """The result of `work`, or None if the client leaves first."""
    folding = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((folding, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await folding if folding.done() else None
    finally:
        folding.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
