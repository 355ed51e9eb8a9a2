"""OpenAI's rules for `strict: true`: which schemas a client may send. Says nothing about what they mean.

Looser than the original where that harms nobody: annotations such as `default` may stand anywhere, and every
`format` that is enforced is allowed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.schema.keywords import ENFORCED, REFUSED

_ALLOWED = frozenset(
    {
        "type", "enum", "const", "$ref", "anyOf", "properties", "required", "additionalProperties", "items",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "format",
        "minLength", "maxLength", "minItems", "maxItems",
    }
)  # fmt: skip
FORBIDDEN = (ENFORCED.keys() | REFUSED.keys()) - _ALLOWED

MAX_NESTING = 10
MAX_PROPERTIES = 5000
MAX_ENUM_VALUES = 1000
MAX_NAME_CHARACTERS = 120_000
MAX_LARGE_ENUM_CHARACTERS = 15_000
LARGE_ENUM = 250

Context = tuple[str, ...]


def check_strict(schema: Any, name: str = "") -> None:
    """Raises ConstraintError in OpenAI's words. `name` is the one the caller gave the format."""
    try:
        _Check().run(schema)
    except _Invalid as error:
        raise ConstraintError(f"Invalid schema for response_format '{name}': {error}") from None


class _Invalid(Exception):
    pass


def _in(context: Context, message: str) -> _Invalid:
    return _Invalid(f"In context={context!r}, {message}")


@dataclass(slots=True)
class _Check:
    num_properties: int = 0
    num_enum_values: int = 0
    num_characters: int = 0
    stack: list[tuple[Any, Context, int]] = field(default_factory=list)

    def run(self, schema: Any) -> None:
        if not isinstance(schema, dict):
            raise _Invalid("schema must be a JSON Schema of 'type: \"object\"'.")
        if "anyOf" in schema:
            raise _in((), "'anyOf' is not permitted at the top level.")
        if "$ref" not in schema and schema.get("type") != "object":
            raise _Invalid(
                f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {_shown(schema)}'."
            )
        self.stack.append((schema, (), 0))
        while self.stack:
            self._visit(*self.stack.pop())

    def _visit(self, schema: Any, context: Context, depth: int) -> None:
        if not isinstance(schema, dict):
            raise _in(context, "schema must be an object.")
        if depth > MAX_NESTING:
            raise _in(context, f"schema exceeds maximum nesting depth of {MAX_NESTING}.")
        for keyword in schema:
            if keyword in FORBIDDEN:
                raise _in(context, f"'{keyword}' is not permitted.")
        if not schema.keys() & {"type", "$ref", "anyOf", "enum", "const"}:
            raise _in(context, "schema must have a 'type' key.")
        types = schema.get("type")
        if types == "object" or (isinstance(types, list) and "object" in types) or "properties" in schema:
            self._visit_object(schema, context)
        if (types == "array" or (isinstance(types, list) and "array" in types)) and "items" not in schema:
            raise _in(context, "array schema missing items.")
        self._count_values(schema, context)
        self.stack.extend(_inner(schema, context, depth))

    def _visit_object(self, schema: dict[str, Any], context: Context) -> None:
        if schema.get("additionalProperties") is not False:
            raise _in(context, "'additionalProperties' is required to be supplied and to be false.")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise _in(context, "'properties' must be an object.")
        for name in properties:
            if not isinstance(required, list) or name not in required:
                raise _in(
                    context,
                    "'required' is required to be supplied and to be an array including every key in properties. "
                    f"Missing '{name}'.",
                )
        for name in required:
            if name not in properties:
                raise _in(context, f"'required' names '{name}', which is not in properties.")
        self.num_properties += len(properties)
        if self.num_properties > MAX_PROPERTIES:
            raise _Invalid(f"schema exceeds maximum of {MAX_PROPERTIES} object properties.")
        self._count_characters(sum(map(len, properties)))

    def _count_values(self, schema: dict[str, Any], context: Context) -> None:
        values = schema.get("enum", [])
        if not isinstance(values, list):
            raise _in(context, "'enum' must be an array.")
        self.num_enum_values += len(values)
        if self.num_enum_values > MAX_ENUM_VALUES:
            raise _Invalid(f"schema exceeds maximum of {MAX_ENUM_VALUES} enum values.")
        length = sum(len(value) for value in values if isinstance(value, str))
        if len(values) > LARGE_ENUM and length > MAX_LARGE_ENUM_CHARACTERS:
            raise _in(
                context,
                f"enum with more than {LARGE_ENUM} values exceeds {MAX_LARGE_ENUM_CHARACTERS} characters in total.",
            )
        if isinstance(schema.get("const"), str):
            length += len(schema["const"])
        definitions = [schema[k] for k in ("$defs", "definitions") if isinstance(schema.get(k), dict)]
        self._count_characters(length + sum(len(name) for group in definitions for name in group))

    def _count_characters(self, number: int) -> None:
        self.num_characters += number
        if self.num_characters > MAX_NAME_CHARACTERS:
            raise _Invalid(
                f"schema exceeds maximum of {MAX_NAME_CHARACTERS} characters in names and enum values."
            )


def _inner(schema: dict[str, Any], context: Context, depth: int) -> Iterator[tuple[Any, Context, int]]:
    for keyword in ("properties", "$defs", "definitions"):
        group = schema.get(keyword, {})
        if not isinstance(group, dict):
            raise _in(context, f"'{keyword}' must be an object.")
        deeper = depth + 1 if keyword == "properties" else 0
        for name, inner in group.items():
            yield inner, (*context, keyword, name), deeper
    if "items" in schema:
        yield schema["items"], (*context, "items"), depth + 1
    options = schema.get("anyOf", [])
    if not isinstance(options, list):
        raise _in(context, "'anyOf' must be an array.")
    for i, inner in enumerate(options):
        yield inner, (*context, "anyOf", str(i)), depth


def _shown(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    return f'"{kind}"' if isinstance(kind, str) else str(kind)
