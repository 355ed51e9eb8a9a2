"""`$schema` decides the few things that drafts of JSON Schema disagree about."""

from typing import Any

import jsonschema
import pytest

DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"

CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"$schema": DRAFT_4, "type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
    ({"$schema": DRAFT_4, "type": "integer", "maximum": 3, "exclusiveMaximum": False}, [3], [4]),
    ({"$schema": DRAFT_7, "type": "integer", "exclusiveMinimum": 3}, [4], [3]),
    (
        {"$schema": DRAFT_7, "type": "array", "items": [{"const": 1}], "additionalItems": {"type": "string"}},
        [[], [1], [1, "x"]],
        [[2], [1, 2]],
    ),
    ({"$schema": DRAFT_7, "type": "array", "items": [{}], "additionalItems": False}, [[1]], [[1, 2]]),
    ({"$schema": DRAFT_7, "type": "array", "items": {}, "additionalItems": False}, [[1, 2]], [{}]),
    ({"$schema": DRAFT_2019, "type": "array", "items": [{"const": 1}, {"const": 2}]}, [[1, 2, 3]], [[2]]),
    (
        {"$schema": DRAFT_7, "type": "object", "dependencies": {"a": ["b"]}},
        [{"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    (
        {"$schema": DRAFT_7, "type": "object", "dependencies": {"a": {"required": ["c"]}}},
        [{}, {"a": 1, "c": 1}],
        [{"a": 1}],
    ),
    (
        {
            "$schema": DRAFT_7,
            "definitions": {"n": {"type": "integer"}},
            "items": {"$ref": "#/definitions/n", "minimum": 5},
        },
        [[1], [9]],
        [["x"]],
    ),
    (
        {
            "$schema": DRAFT_2019,
            "$defs": {"n": {"type": "integer"}},
            "items": {"$ref": "#/$defs/n", "minimum": 5},
        },
        [[9]],
        [[1], ["x"]],
    ),
    (
        {
            "$schema": DRAFT_4,
            "id": "http://x.org/root.json",
            "definitions": {"a": {"id": "sub.json", "definitions": {"b": {"type": "null"}}}},
            "items": {"$ref": "sub.json#/definitions/b"},
        },
        [[None]],
        [[1]],
    ),
    ({"$schema": DRAFT_7, "$id": "#root", "items": {"$id": "#/items", "type": "null"}}, [[None]], [[1]]),
    (
        {"$schema": DRAFT_4, "type": "object", "properties": {"id": {"type": "string"}}},
        [{"id": "x"}],
        [{"id": 1}],
    ),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES)
def test_drafts(schema, valid, invalid, compiled, accepts_value):
    validator = jsonschema.validators.validator_for(schema)(schema)
    grammar = compiled(schema)
    for value in valid:
        assert validator.is_valid(value)
        assert accepts_value(grammar, value), value
    for value in invalid:
        assert not validator.is_valid(value)
        assert not accepts_value(grammar, value), value
