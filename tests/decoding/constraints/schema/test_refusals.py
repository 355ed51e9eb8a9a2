"""What is refused: malformed schemas, keywords that cannot be enforced, schemas without values, hostile ones."""

import contextlib
import json
import resource
import time
from typing import Any

import pytest

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions, schema_grammar

REFUSED: list[tuple[Any, str, str]] = [
    # schema, part of the message, place
    ({"type": "strng"}, "type must be one of", "#/type"),
    ({"type": 5}, "type must be one of", "#/type"),
    ({"minLength": "3"}, "minLength must be a non-negative integer", "#/minLength"),
    ({"minLength": -1}, "minLength", "#/minLength"),
    ({"maxItems": True}, "maxItems", "#/maxItems"),
    ({"minimum": "1"}, "minimum must be a number", "#/minimum"),
    ({"multipleOf": 0}, "multipleOf must be greater than 0", "#/multipleOf"),
    ({"pattern": 1}, "pattern must be a string", "#/pattern"),
    ({"properties": {"a/b": {"pattern": "("}}}, "pattern '('", "#/properties/a~1b/pattern"),
    ({"pattern": r"(a)\1"}, "pattern", "#/pattern"),
    ({"properties": {"x": {"patternProperties": {"[": {}}}}}, "pattern '['", "#/properties/x/patternProperties/["),
    ({"properties": []}, "properties must be an object", "#/properties"),
    ({"properties": {"a": 5}}, "a schema must be", "#/properties/a"),
    ({"required": "a"}, "required must be an array of strings", "#/required"),
    ({"required": True}, "required must be an array of strings", "#/required"),
    ({"enum": "a"}, "enum must be an array", "#/enum"),
    ({"anyOf": []}, "anyOf must be an array that is not empty", "#/anyOf"),
    ({"allOf": {}}, "allOf must be an array", "#/allOf"),
    ({"uniqueItems": 1}, "uniqueItems must be true or false", "#/uniqueItems"),
    ({"dependentRequired": {"a": "b"}}, "dependentRequired", "#/dependentRequired"),
    ({"$ref": "#/nowhere"}, "names no part of the schema", "#/$ref"),
    ({"$ref": "#nowhere"}, "names no part of the schema", "#/$ref"),
    ({"items": {"$ref": "https://example.com/other"}}, "leads out of the schema", "#/items/$ref"),
    ({"$ref": 5}, "$ref must be a string", "#/$ref"),
    ({"$ref": "#"}, "leads back to itself", "#"),
    ({"allOf": [{"$ref": "#"}]}, "leads back to itself", "#"),
    ({"not": {"$ref": "#"}}, "leads back to itself", "#"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft 3 is not supported", "#/$schema"),
    ({"properties": {"x": {"contains": {}, "unevaluatedItems": False}}},
     "unevaluatedItems is not supported beside contains", "#/properties/x/unevaluatedItems"),
    ({"anyOf": [{"contains": {}}, {}], "unevaluatedItems": False}, "unevaluatedItems is not supported beside contains",
     "#/unevaluatedItems"),
    ({"$dynamicRef": "#x"}, "$dynamicRef is not supported", "#/$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef is not supported", "#/$recursiveRef"),
    ({"divisibleBy": 2}, "divisibleBy is not supported", "#/divisibleBy"),
    ({"properties": {"x": {"format": "color"}}}, "format 'color' is not supported", "#/properties/x/format"),
    ({"not": {"format": "email"}}, "format 'email' is not supported where a schema is negated", "#/not/format"),
    ({"items": {"type": "string"}, "uniqueItems": True}, "uniqueItems is not supported where", "#/uniqueItems"),
    ({"type": "object", "minProperties": 2}, "minProperties above one", "#"),
    ({"const": float("nan")}, "not JSON", ""),
    ({"const": "\ud800"}, "surrogate", ""),
    ({"const": {1, 2}}, "not JSON", ""),
    (5, "a schema must be", "#"),
    (None, "a schema must be", "#"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message", "where"), REFUSED, ids=[repr(c[0])[:60] for c in REFUSED])
def test_says_what_and_where(schema, message, where):
    with pytest.raises(ConstraintError) as caught:
        schema_grammar(schema, SchemaOptions(), Effort())
    assert message in str(caught.value)
    assert (f"(at {where})" in str(caught.value)) == bool(where)
    assert "\n" not in str(caught.value)


UNSATISFIABLE = [
    False,
    {"not": {}},
    {"enum": []},
    {"type": []},
    {"type": "integer", "minimum": 2, "maximum": 1},
    {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
    {"type": "number", "exclusiveMinimum": 1, "maximum": 1},
    {"type": "integer", "minimum": 1, "maximum": 5, "multipleOf": 7},
    {"type": "string", "pattern": "^a{5}$", "maxLength": 3},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "^b"}]},
    {"type": "string", "format": "date", "maxLength": 9},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"type": "object", "required": ["a"], "properties": {"a": False}},
    {"type": "object", "required": ["a", "b"], "maxProperties": 1},
    {"type": "object", "propertyNames": {"pattern": "^b"}, "required": ["a"]},
    {"type": "object", "additionalProperties": False, "minProperties": 1},
    {"type": "array", "minItems": 1, "items": False},
    {"type": "array", "maxItems": 0, "contains": {}},
    {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 3},
    {"type": "array", "contains": {"type": "string"}, "items": {"type": "integer"}},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"allOf": [{"const": 1}, {"const": 2}]},
    {"oneOf": [{"type": "string"}, {"type": "string"}], "type": "string"},
]


@pytest.mark.parametrize("schema", UNSATISFIABLE, ids=[json.dumps(s)[:60] for s in UNSATISFIABLE])
def test_no_value(schema):
    with pytest.raises(ConstraintError, match="no value satisfies the schema"):
        schema_grammar(schema, SchemaOptions(), Effort())


def _nested(keyword: str, depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword in ("allOf", "anyOf", "oneOf") else schema}
    return schema


def _chain(length: int) -> Any:
    definitions = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return {"$defs": {**definitions, f"d{length}": {}}, "$ref": "#/$defs/d0"}


def _optional(names: int, **more: Any) -> Any:
    return {"type": "object", "properties": {f"p{i}": {"pattern": f"^x{i}"} for i in range(names)}, **more}


def _subsets(number: int) -> Any:
    """Exactly one of many overlapping ones: a product of negations."""
    members = [
        {"required": [f"a{i}", f"b{i}"], "properties": {f"c{i}": {"type": "string"}}} for i in range(number)
    ]
    return {"type": "object", "oneOf": members}


HOSTILE = {
    "deep properties": {"properties": _nested("additionalProperties", 150)},
    "deep items": _nested("items", 5000),
    "deep not": _nested("not", 150),
    "deeper not": _nested("not", 3000),
    "deep allOf": _nested("allOf", 3000),
    "deep oneOf": _nested("oneOf", 190),
    "deep value": {"const": json.loads("[" * 900 + "]" * 900)},
    "long chain of references": _chain(2000),
    "many properties": _optional(5000),
    "many counted properties": _optional(400, maxProperties=390, minProperties=300),
    "many overlapping members": _subsets(40),
    "many values": {"enum": [f"value {i}" for i in range(20000)]},
    "many numbers": {"not": {"enum": list(range(5000))}, "type": "integer"},
    "many dependencies": {"type": "object", "dependentRequired": {f"a{i}": [f"b{i}"] for i in range(40)}},
    "many patterns": {"type": "object", "patternProperties": {f"a{i}.*b{i}": {"minimum": i} for i in range(30)}},
    "long string": {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    "huge count of items": {"type": "array", "minItems": 10**6},
    "many items that differ": {"type": "array", "items": {"enum": list(range(10))}, "uniqueItems": True, "minItems": 9},
    "a large prime": {"type": "integer", "multipleOf": 1_000_003},
    "a tiny step": {"type": "number", "multipleOf": 1e-300},
    "bounds of many digits": {"type": "integer", "minimum": 10**4000},
    "steps of many digits": {"type": "integer", "multipleOf": 10**4000 + 1},
    "huge bounds": {"type": "number", "minimum": -1e300, "maximum": 1e308},
    "catastrophic pattern": {"type": "string", "pattern": "^((a|b)*a(a|b){25})+$"},
    "pattern and length": {"type": "string", "pattern": r"^(?:\S+\s+){0,400}\S+$", "maxLength": 5000},
    "any of many objects": {
        "anyOf": [{"properties": {f"k{i}": {"const": i}}, "required": [f"k{i}"]} for i in range(1500)]
    },
    "many contained": {"type": "array", "allOf": [{"contains": {"const": i}, "maxContains": 3} for i in range(12)]},
    "one large document": {"properties": {f"p{i}": {"description": "x" * 1000} for i in range(400)}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end_soon(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with contextlib.suppress(ConstraintError):
        schema_grammar(HOSTILE[name], SchemaOptions(), Effort())
    assert time.perf_counter() - started < 4  # the limit is 1 s of an unburdened machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # in units of 1 KiB


def test_too_complex_is_told_apart():
    with pytest.raises(ConstraintTooComplex):
        schema_grammar(_nested("items", 5000), SchemaOptions(), Effort())
