"""Python types and outlines' types as constraints, for callers in Python.

Scalars (and Literal, Enum, unions of these) are outlines' output types: `Literal["a", "b"]` answers with a or b, not
with a quoted string. Records and containers are JSON, by the schema that pydantic gives them. Knows nothing of how
constraints are enforced; needs pydantic, and imports outlines (a second) only for what is outlines' own.
"""

import datetime
import sys
import types
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NewType, Union, get_args, get_origin, is_typeddict

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.spec import ConstraintSpec

if TYPE_CHECKING:
    from outlines.types.dsl import Term

_SCALARS = (int, float, bool, str, datetime.date, datetime.time, datetime.datetime, type(None))
_UNIONS = (Union, types.UnionType)


def spec_of_type(value: Any) -> ConstraintSpec:
    """Raises ConstraintError for what is no type, or has no exact constraint."""
    try:
        return _spec(value)
    except RecursionError:
        raise ConstraintTooComplex(f"{_shown(value)} is nested too deeply") from None
    except ConstraintError:
        raise
    except (PydanticUserError, NameError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConstraintError(f"{_shown(value)} cannot be made a constraint: {reason}") from None


def _spec(value: Any) -> ConstraintSpec:
    if _is_term(value):
        return _spec_of_term(value)
    if value is dict:
        return ConstraintSpec.json_object()
    if _is_scalar(value):
        texts = _texts(value)
        return _spec_of_term(_as_term(value)) if texts is None else _one_of(texts)
    if isinstance(value, type) or get_origin(value) is not None or value is Any or is_typeddict(value):
        # a record is its fields: what else the schema would allow has no place in it
        return ConstraintSpec.json_schema(TypeAdapter(value).json_schema(), additional_properties=False)
    if isinstance(value, types.FunctionType) or hasattr(
        value, "to_json"
    ):  # arguments; genson's SchemaBuilder
        return _spec_of_term(_as_term(value))
    raise ConstraintError(
        f"{_shown(value)} is no constraint: give a type, a JSON schema as a dict, a compiled re pattern, one of "
        "outlines' types, or a ConstraintSpec (whose classmethods take texts)"
    )


def _is_scalar(value: Any) -> bool:
    """Whether an answer of this type is a bare text rather than JSON."""
    origin = get_origin(value)
    if origin in _UNIONS:
        return all(_is_scalar(member) for member in get_args(value))
    if isinstance(value, NewType):
        return _is_scalar(value.__supertype__)
    return value in _SCALARS or origin is Literal or (isinstance(value, type) and issubclass(value, Enum))


def _texts(value: Any) -> list[str] | None:
    """The answers that a Literal, an Enum or a union of these allows; None: more than a list of texts."""
    if get_origin(value) is Literal:
        return _written(get_args(value))
    if isinstance(value, type) and issubclass(value, Enum):
        members = [member.value for member in value]
        return None if any(callable(member) for member in members) else _written(members)
    if value is type(None):
        return ["None"]
    if get_origin(value) in _UNIONS:
        parts = [_texts(member) for member in get_args(value)]
        return None if None in parts else [text for part in parts if part is not None for text in part]
    return None


def _written(values: Iterable[Any]) -> list[str] | None:
    """As outlines writes them: numbers and True, False, None as in Python; an enum's member as its value."""
    plain = [value.value if isinstance(value, Enum) else value for value in values]
    if all(isinstance(value, str | int | float | None) for value in plain):
        return [str(value) for value in plain]
    return None


def _one_of(texts: list[str]) -> ConstraintSpec:
    if not texts:
        raise ConstraintError("a choice needs at least one option")
    return ConstraintSpec.choice(list(dict.fromkeys(texts)))


# outlines' terms


def _is_term(value: Any) -> bool:
    """Whoever holds a term has imported outlines."""
    dsl = sys.modules.get("outlines.types.dsl")
    return dsl is not None and isinstance(value, dsl.Term)


def _as_term(value: Any) -> "Term":
    from outlines.types.dsl import Regex, python_types_to_terms

    return Regex("None") if value is type(None) else python_types_to_terms(value)


def _spec_of_term(term: "Term") -> ConstraintSpec:
    from outlines.types.dsl import CFG, JsonSchema, Regex, to_regex

    if isinstance(term, JsonSchema):
        return ConstraintSpec.json_schema(term.schema, whitespace_pattern=term.whitespace_pattern)
    if isinstance(term, CFG):
        return ConstraintSpec.grammar(term.definition)
    if isinstance(term, Regex):
        return ConstraintSpec.regex(term.pattern)
    texts = _texts_of_term(term)
    if texts is not None and all(texts):
        return _one_of(texts)
    _check_regular(term)
    return ConstraintSpec.regex(to_regex(term))


def _texts_of_term(term: "Term") -> list[str] | None:
    from outlines.types.dsl import Alternatives, Choice, String

    if isinstance(term, String):
        return [term.value]
    if isinstance(term, Choice):
        return _written(term.items)
    if isinstance(term, Alternatives):
        parts = [_texts_of_term(part) for part in term.terms]
        return None if None in parts else [text for part in parts if part is not None for text in part]
    return None


def _check_regular(term: "Term") -> None:
    """outlines turns a JSON schema inside a larger term into a regex that only comes near it: refused."""
    from outlines.types.dsl import CFG, Choice, JsonSchema

    if isinstance(term, JsonSchema | CFG):
        raise ConstraintError(
            f"outlines' {type(term).__name__} can only be a constraint by itself, not a part of another term: "
            "write a union of types, a JSON schema with anyOf, or one grammar"
        )
    if isinstance(term, Choice):
        parts = [_as_term(item) for item in term.items]
    else:
        parts = [*getattr(term, "terms", ()), *([term.term] if hasattr(term, "term") else ())]
    for part in parts:
        _check_regular(part)


def _shown(value: Any) -> str:
    """Short and on one line, whatever the value's `repr` does."""
    return getattr(value, "__name__", None) or f"a value of type {type(value).__name__}"
