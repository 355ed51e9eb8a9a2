"""The ways to ask for an output constraint: OpenAI's, vLLM's, llama.cpp's and SGLang's fields, as one `ConstraintSpec`.

Checks the shape of the fields, that there is exactly one constraint, and that options have something to apply to.
Whether a schema, a pattern or a grammar is right is found out when it is compiled.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import from_json

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.spec import ConstraintSpec, Kind
from cadenza.decoding.request import RequestError
from cadenza.server.protocol.wire import Wire


def _schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON schema: an object or a boolean.")
    return value


def _schema_or_text(value: Any) -> Any:
    return _schema(_parsed(value))


def _tag(value: Any) -> Any:
    value = _parsed(value)
    if not isinstance(value, dict):
        raise ValueError("must be a structural tag: an object, or one written as a string.")
    return value


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None


Schema = Annotated[Any, PlainValidator(_schema)]
SchemaOrText = Annotated[Any, PlainValidator(_schema_or_text)]
Text = Annotated[str, Field(min_length=1)]
Options = Annotated[list[Text], Field(min_length=1)]


class Way(NamedTuple):
    """One constraint that a body asks for, and the field that does."""

    param: str
    kind: Kind
    value: Any
    strict: bool = False
    name: str | None = None

    @property
    def spec(self) -> ConstraintSpec:
        param = self.param
        match self.kind:
            case "json_schema":
                return ConstraintSpec.json_schema(self.value, strict=self.strict, name=self.name, param=param)
            case "json_object":
                return ConstraintSpec.json_object(param=param)
            case "regex":
                return ConstraintSpec.regex(self.value, param=param)
            case "choice":
                return ConstraintSpec.choice(self.value, param=param)
            case "grammar":
                return ConstraintSpec.grammar(self.value, param=param)
            case "structural_tag":
                return ConstraintSpec.structural_tag(self.value, param=param)


class NamedSchema(Wire):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Wire):
    """OpenAI's field. A structural tag has either `structures` with `triggers`, or `format`."""

    type: Literal["text", "json_object", "json_schema", "grammar", "structural_tag"]
    json_schema: NamedSchema | None = None
    grammar: Text | None = None
    structures: Any = None
    triggers: Any = None
    format: Any = None

    def check(self) -> None:
        given = {name for name in self.model_fields_set if name != "type"}
        forms = _MEMBERS[self.type]
        for name in sorted(given.difference(*forms)):
            raise _error(f"response_format.{name}", f"does not belong to type {self.type}")
        form = next((form for form in forms if given & set(form)), forms[0])
        for name in sorted(given.difference(form)):
            raise _error(f"response_format.{name}", f"cannot stand beside {form[0]}")
        for name in form:
            if name not in given:
                path = f"response_format.{name}"
                raise RequestError(f"{path} is required.", path, "missing_required_parameter")

    def ways(self) -> Iterator[Way]:
        match self.type:
            case "json_object":
                yield Way("response_format", "json_object", None)
            case "json_schema":
                assert self.json_schema is not None
                schema = self.json_schema
                param = "response_format.json_schema.schema"
                yield Way(param, "json_schema", schema.schema_, schema.strict, schema.name)
            case "grammar":
                yield Way("response_format.grammar", "grammar", self.grammar)
            case "structural_tag":
                names = ("type", "structures", "triggers", "format")
                tag = {name: getattr(self, name) for name in names if name in self.model_fields_set}
                yield Way("response_format", "structural_tag", tag)


_MEMBERS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "text": ((),),
    "json_object": ((),),
    "json_schema": (("json_schema",),),
    "grammar": (("grammar",),),
    "structural_tag": (("format",), ("structures", "triggers")),
}


class StructuredOutputs(Wire):
    """vLLM's field."""

    json_: SchemaOrText = Field(None, alias="json")
    regex: Text | None = None
    choice: Options | None = None
    grammar: Text | None = None
    json_object: bool = False
    structural_tag: Annotated[Any, PlainValidator(_tag)] = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def check(self) -> None:
        if not any(True for _ in self.ways()):
            kinds = "json, regex, choice, grammar, json_object, structural_tag"
            raise _error("structured_outputs", f"needs one of {kinds}")

    def ways(self) -> Iterator[Way]:
        for name, kind in _STRUCTURED_OUTPUTS:
            value = getattr(self, name)
            if value is not None and not (kind == "json_object" and value is False):
                yield Way(f"structured_outputs.{name.rstrip('_')}", kind, value)


_STRUCTURED_OUTPUTS: Final[tuple[tuple[str, Kind], ...]] = (
    ("json_", "json_schema"),
    ("regex", "regex"),
    ("choice", "choice"),
    ("grammar", "grammar"),
    ("json_object", "json_object"),
    ("structural_tag", "structural_tag"),
)


class ConstraintFields(Wire):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText = None
    guided_regex: Text | None = None
    guided_choice: Options | None = None
    guided_grammar: Text | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: SchemaOrText = None
    grammar: Text | None = None
    regex: Text | None = None
    ebnf: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: Any) -> Any:
        """Values by which clients say that they want no constraint."""
        if not isinstance(value, dict):
            return value
        neutral = {"response_format": {"type": "text"}, "grammar": ""}
        return {name: item for name, item in value.items() if name not in neutral or item != neutral[name]}

    def check(self) -> None:
        super().check()
        if self.response_format is not None:
            self.response_format.check()
        if self.structured_outputs is not None:
            self.structured_outputs.check()
        if self.ebnf is not None and "::=" not in self.ebnf:
            raise _error("ebnf", "must have rules, written with ::=")
        _ = self.constraint_spec

    @cached_property
    def constraint_spec(self) -> ConstraintSpec | None:
        """The one constraint that the body asks for. Raises RequestError where that is not clear."""
        ways = list(self._ways())
        if len(ways) > 1:
            raise _error(ways[1].param, f"excludes {ways[0].param}: a request has at most one constraint")
        way = ways[0] if ways else None
        options = self._json_options(way)
        if way is None:
            return None
        try:
            return replace(way.spec, **options)
        except ConstraintError as error:
            raise RequestError(f"{way.param}: {error}", way.param, "invalid_constraint") from None

    def _ways(self) -> Iterator[Way]:
        if self.response_format is not None:
            yield from self.response_format.ways()
        if self.structured_outputs is not None:
            yield from self.structured_outputs.ways()
        for name, kind in _ALIASES:
            value = getattr(self, name)
            if value is not None:
                yield Way(name, kind, value)

    def _json_options(self, way: Way | None) -> dict[str, Any]:
        """The fields of the specification that say how JSON is written."""
        asked = list(self._asked_options())
        options: dict[str, Any] = {}
        given_by: dict[str, str] = {}
        for param, name, value in asked:
            if way is None or way.kind not in ("json_schema", "json_object", "structural_tag"):
                raise _error(param, "needs a constraint with JSON")
            if name == "additional_properties" and way.kind == "json_object":
                raise _error(param, "needs a schema")
            other = given_by.setdefault("any_whitespace" if name == "whitespace_pattern" else name, param)
            if other != param:
                raise _error(param, f"excludes {other}")
            options[name] = value
        return options

    def _asked_options(self) -> Iterator[tuple[str, str, Any]]:
        """Of each option: the field that asks for it, its name in the specification, its value there."""
        if self.guided_whitespace_pattern is not None:
            yield "guided_whitespace_pattern", "whitespace_pattern", self.guided_whitespace_pattern
        outputs = self.structured_outputs
        if outputs is None:
            return
        if outputs.whitespace_pattern is not None:
            yield "structured_outputs.whitespace_pattern", "whitespace_pattern", outputs.whitespace_pattern
        if outputs.disable_any_whitespace:
            yield "structured_outputs.disable_any_whitespace", "any_whitespace", False
        if outputs.disable_additional_properties:
            yield "structured_outputs.disable_additional_properties", "additional_properties", False


_ALIASES: Final[tuple[tuple[str, Kind], ...]] = (
    ("guided_json", "json_schema"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("json_schema", "json_schema"),
    ("grammar", "grammar"),
    ("regex", "regex"),
    ("ebnf", "grammar"),
)


def _error(param: str, rule: str) -> RequestError:
    return RequestError(f"{param} {rule}.", param)
