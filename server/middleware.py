"""What happens to every request before its route: the key, and the id that its answer carries.

Plain ASGI, because Starlette's function middleware hides the client's disconnect from streaming routes.
"""

import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cadenza.server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ping"})


class RequestIds:
    """Echoes the client's `x-request-id`, or makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """Refuses requests without one of the keys; probes of health need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allows(scope):
            await key_refusal("API key").response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        return bears_one_of(Headers(scope=scope), self._keys)


def bears_one_of(headers: Headers, keys: Sequence[str]) -> bool:
    """Whether the request has one of these keys."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    # Every key is compared, in constant time: how long it takes tells nothing.
    matches = [secrets.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
    return any(matches)


def key_refusal(kind: str) -> ApiError:
    return ApiError(
        401,
        f"A valid {kind} is required: Authorization: Bearer KEY.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
