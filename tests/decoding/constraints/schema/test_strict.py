"""OpenAI's rules for strict schemas."""

from typing import Any

import pytest

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.schema import check_strict


def strict_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


ALLOWED = [
    strict_object(),
    strict_object(a={"type": "string", "description": "d", "default": "x"}, b={"type": ["integer", "null"]}),
    strict_object(a={"anyOf": [{"type": "string"}, strict_object(c={"type": "null"})]}),
    {
        **strict_object(node={"$ref": "#/$defs/n"}),
        "$defs": {"n": strict_object(next={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})},
    },
    strict_object(a={"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1}, b={"const": 5}),
    strict_object(
        a={"type": "number", "minimum": 0, "multipleOf": 2},
        b={"type": "string", "pattern": "^a", "format": "date"},
    ),
    {"$ref": "#/$defs/r", "$defs": {"r": strict_object(a={"type": "string"})}},
]


@pytest.mark.parametrize("schema", ALLOWED)
def test_allowed(schema):
    check_strict(schema, "answer")


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = strict_object(a=schema)
    return schema


FORBIDDEN: list[tuple[Any, str]] = [
    ([], "schema must be a JSON Schema of 'type: \"object\"'."),
    (
        {"type": "array", "items": {}},
        "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"array\"'.",
    ),
    ({}, "got 'type: None'"),
    ({"anyOf": [strict_object()]}, "In context=(), 'anyOf' is not permitted at the top level."),
    (
        {"type": "object", "properties": {}},
        "In context=(), 'additionalProperties' is required to be supplied and to be false.",
    ),
    (
        strict_object(x={"type": "object", "properties": {}, "required": []}),
        "In context=('properties', 'x'), 'additionalProperties' is required to be supplied and to be false.",
    ),
    (
        {**strict_object(a={"type": "string"}), "required": []},
        "'required' is required to be supplied and to be an array including every key in properties. Missing 'a'.",
    ),
    ({**strict_object(), "required": ["b"]}, "'required' names 'b', which is not in properties."),
    (
        strict_object(a={"allOf": [{"type": "string"}]}),
        "In context=('properties', 'a'), 'allOf' is not permitted.",
    ),
    (strict_object(a={"not": {"type": "null"}}), "'not' is not permitted."),
    (strict_object(a={"type": "object", "patternProperties": {}}), "'patternProperties' is not permitted."),
    ({**strict_object(), "if": {}}, "'if' is not permitted."),
    ({**strict_object(), "dependentRequired": {}}, "'dependentRequired' is not permitted."),
    (
        strict_object(a={"description": "nothing else"}),
        "In context=('properties', 'a'), schema must have a 'type' key.",
    ),
    (strict_object(a=True), "In context=('properties', 'a'), schema must be an object."),
    (strict_object(a={"type": "array"}), "In context=('properties', 'a'), array schema missing items."),
    (
        strict_object(a={"type": "array", "items": {"not": {}}}),
        "In context=('properties', 'a', 'items'), 'not' is not permitted.",
    ),
    (
        {**strict_object(), "$defs": {"d": {"oneOf": []}}},
        "In context=('$defs', 'd'), 'oneOf' is not permitted.",
    ),
    (_nested(11), "exceeds maximum nesting depth of 10"),
    (
        strict_object(**{f"p{i}": {"type": "string"} for i in range(5001)}),
        "maximum of 5000 object properties",
    ),
    (strict_object(a={"enum": list(range(1001))}), "maximum of 1000 enum values"),
    (strict_object(a={"enum": [f"{i:070}" for i in range(251)]}), "exceeds 15000 characters"),
    (strict_object(**{"x" * 120_001: {"type": "string"}}), "maximum of 120000 characters"),
    (strict_object(a={"anyOf": {}}), "'anyOf' must be an array."),
]


@pytest.mark.parametrize(("schema", "message"), FORBIDDEN, ids=[message[:50] for _, message in FORBIDDEN])
def test_forbidden(schema, message):
    with pytest.raises(ConstraintError) as caught:
        check_strict(schema, "answer")
    assert str(caught.value).startswith("Invalid schema for response_format 'answer': ")
    assert message in str(caught.value)


def test_ten_levels_are_allowed():
    check_strict(_nested(10))
