"""From the bytes of a body to a checked model, or to a 400 that names the field. It knows no field by name.

Three rules hold for every body: null means absent, an unknown field is refused, and types are strict
(the string "0.5" is not a number).
"""

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from cadenza.decoding.request import RequestError
from cadenza.server.errors import ApiError
from cadenza.server.protocol.unsupported import without_neutral


class Wire(BaseModel):
    """A JSON object that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None}

    def check(self) -> None:
        """Raise `RequestError` for what no single field can tell, such as two fields that contradict."""


Body = TypeVar("Body", bound=Wire)


async def read(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The body of `request` as a `kind`, or the error that says why not."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError(
            f"The Content-Type must be application/json, got {content_type or 'none'!r}.", "content-type"
        )
    return parse(kind, await _read_bytes(request, max_bytes))


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def parse(kind: type[Body], raw: bytes) -> Body:
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    present = {name: value for name, value in data.items() if value is not None}
    try:
        body = kind.model_validate(without_neutral(present, known=kind.model_fields))
    except ValidationError as error:
        raise _first_error(error.errors(include_url=False, include_input=False)) from None
    body.check()
    return body


def _first_error(errors: list[ErrorDetails]) -> RequestError:
    error = errors[0]
    param = _path(error["loc"])
    match error["type"]:
        case "missing":
            return RequestError(f"{param} is required.", param, "missing_required_parameter")
        case "extra_forbidden":
            return RequestError(f"Unrecognized request argument: {param}", param, "unknown_parameter")
        case "model_type" | "dict_type":  # pydantic would name our class
            return RequestError(f"{param} must be a JSON object.", param)
        case "list_type":
            return RequestError(f"{param} must be a list.", param)
        case "value_error":
            return RequestError(f"{param} {error['ctx']['error']}", param)
        case _:
            return RequestError(f"{param}: {error['msg']}", param)


def _path(location: tuple[Any, ...]) -> str:
    """`("messages", 0, "role")` as clients write it: messages[0].role."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path
