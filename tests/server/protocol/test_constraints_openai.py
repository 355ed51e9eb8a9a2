"""What the official client makes of pydantic models reaches the engine as a strict schema."""

import json
from typing import Any, Literal

import pydantic
import pytest
from openai.lib._parsing._completions import type_to_response_format_param
from openai.lib._pydantic import to_strict_json_schema

from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.wire import parse


class Step(pydantic.BaseModel):
    explanation: str = pydantic.Field(description="why")
    rest: "Step | None" = None


class Solution(pydantic.BaseModel):
    """Steps and their end."""

    steps: list[Step]
    kind: Literal["exact", "rough"]
    digits: int | None


@pytest.mark.parametrize("model", [Step, Solution])
def test_the_body_of_parse(model: type[pydantic.BaseModel]) -> None:
    response_format: Any = type_to_response_format_param(model)
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": response_format}
    spec = parse(ChatRequest, json.dumps(body).encode()).constraint_spec
    assert spec == ConstraintSpec.json_schema(to_strict_json_schema(model), strict=True, name=model.__name__)
    assert spec is not None
    assert list(json.loads(spec.source)["properties"]) == list(model.model_fields)


def test_dataclasses_too() -> None:
    @pydantic.dataclasses.dataclass
    class Point:
        x: float
        y: float

    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": type_to_response_format_param(Point),  # type: ignore[arg-type]
    }
    spec = parse(ChatRequest, json.dumps(body).encode()).constraint_spec
    assert spec is not None
    assert (spec.strict, spec.name) == (True, "Point")
    assert json.loads(spec.source)["required"] == ["x", "y"]
