"""Every failure in the one shape that OpenAI's clients read. It knows nothing of routes or of what was asked.

An exception is described once, by `describe`; whether it leaves as an HTTP status or, when a stream has
begun, as an event inside the stream, is for the caller to say.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cadenza.decoding.adapters.errors import (
    AdapterRefused,
    AdaptersBusy,
    GenerationMismatch,
    PathNotAllowed,
    UnknownAdapter,
)
from cadenza.decoding.request import EngineClosed, QueueFull, RequestError, RequestFailed

logger = logging.getLogger("cadenza.server")

RETRY_AFTER_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error: its HTTP status and the four members of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def unavailable(message: str, code: str) -> ApiError:
    """503: come back later; the request itself is fine."""
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code=code,
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(404, f"The model `{model}` does not exist.", param="model", code="model_not_found")


def describe(error: Exception) -> ApiError:
    """What the client is told of `error`. Anything unforeseen is a 500 that keeps its details to itself."""
    match error:
        case ApiError():
            return error
        case UnknownAdapter() | GenerationMismatch() | PathNotAllowed() | AdapterRefused():
            return _adapter_error(error)
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFull():
            return ApiError(
                429,
                str(error) or "The queue is full.",
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        case AdaptersBusy():
            return unavailable(str(error), "adapters_busy")
        case EngineClosed():
            return unavailable(str(error) or "The server is shutting down.", "engine_closed")
        case RequestFailed():
            return ApiError(500, str(error), type="server_error", code="request_failed")
        case HTTPException():
            return _http_error(error)
        case _:
            return ApiError(500, "Internal server error.", type="server_error", code="internal_error")


def _adapter_error(error: RequestError) -> ApiError:
    kind, param = "invalid_request_error", error.param
    match error:
        case UnknownAdapter():
            status, code, param = 404, "model_not_found", error.param or "lora_name"
        case GenerationMismatch():
            status, code = 409, "generation_mismatch"
        case PathNotAllowed():
            status, code, kind = 403, "path_not_allowed", "permission_error"
        case _:
            status, code = 400, "adapter_refused"
    return ApiError(status, str(error), type=kind, param=param, code=error.code or code)


def _http_error(error: HTTPException) -> ApiError:
    """Starlette's own 404 and 405 say too little; the handler below adds the method and the path."""
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, error.detail, code=code, headers=dict(error.headers or {}) or None)


async def _handle(request: Request, error: Exception) -> Response:
    described = describe(error)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        reason = "Unknown request URL" if error.status_code == 404 else "Method not allowed"
        described.message = f"{reason}: {request.method} {request.url.path}"
    if described.status == 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return described.response


def install(app: FastAPI) -> None:
    """One handler for every kind of failure."""
    ours = (ApiError, RequestError, QueueFull, AdaptersBusy, EngineClosed, RequestFailed)
    for kind in (*ours, HTTPException, Exception):
        app.add_exception_handler(kind, _handle)
