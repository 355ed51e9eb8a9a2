"""What a caller asks of an answer's text, as one hashable value: the key under which its compilation is kept.

Knows the kinds of constraint and how each is written down, and what a constraint cannot be combined with; whether
the source is right is for the compiler to say.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.request import RequestError, SamplingParams

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "structural_tag"]


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """One constraint. Made by its classmethods, which write equal constraints equally."""

    kind: Kind
    source: str
    """JSON text of a schema (members in their order), of the choices or of a structural tag; a regex; a grammar."""
    strict: bool = False
    """Whether the schema must also keep to OpenAI's rules for `strict: true`."""
    name: str | None = None
    """What messages about those rules call the schema."""
    whitespace_pattern: str | None = None
    """A regex for the whitespace in JSON; None: the default, or none at all without `any_whitespace`."""
    any_whitespace: bool = True
    additional_properties: bool | None = None
    """What holds for objects whose schema does not say; None: what JSON Schema says."""
    param: str = field(default="constraint", compare=False)
    """The field of the request that asks for it: for messages."""

    @classmethod
    def json_schema(
        cls,
        schema: Any,
        *,
        strict: bool = False,
        name: str | None = None,
        whitespace_pattern: str | None = None,
        any_whitespace: bool = True,
        additional_properties: bool | None = None,
        param: str = "constraint",
    ) -> "ConstraintSpec":
        """schema: an object or a boolean, or JSON text of one."""
        return cls(
            "json_schema",
            _json_text(_parsed(schema)),
            strict=strict,
            name=name if strict else None,
            whitespace_pattern=whitespace_pattern,
            any_whitespace=any_whitespace,
            additional_properties=additional_properties,
            param=param,
        )

    @classmethod
    def json_object(
        cls,
        *,
        whitespace_pattern: str | None = None,
        any_whitespace: bool = True,
        param: str = "constraint",
    ) -> "ConstraintSpec":
        """Any JSON object."""
        return cls(
            "json_object",
            "",
            whitespace_pattern=whitespace_pattern,
            any_whitespace=any_whitespace,
            param=param,
        )

    @classmethod
    def regex(cls, pattern: str, *, param: str = "constraint") -> "ConstraintSpec":
        """The whole answer matches, as by `re.fullmatch`."""
        return cls("regex", pattern, param=param)

    @classmethod
    def choice(cls, options: Sequence[str], *, param: str = "constraint") -> "ConstraintSpec":
        """The answer is one of these texts."""
        return cls("choice", _json_text(list(options)), param=param)

    @classmethod
    def grammar(cls, text: str, *, param: str = "constraint") -> "ConstraintSpec":
        """A text with `::=` is EBNF (GBNF), otherwise Lark."""
        return cls("grammar", text, param=param)

    @classmethod
    def structural_tag(
        cls,
        tag: Any,
        *,
        whitespace_pattern: str | None = None,
        any_whitespace: bool = True,
        additional_properties: bool | None = None,
        param: str = "constraint",
    ) -> "ConstraintSpec":
        """tag: an object, or JSON text of one."""
        return cls(
            "structural_tag",
            _json_text(_parsed(tag)),
            whitespace_pattern=whitespace_pattern,
            any_whitespace=any_whitespace,
            additional_properties=additional_properties,
            param=param,
        )


def constraint_spec(value: Any) -> ConstraintSpec:
    """What Python callers may give as a constraint: a ConstraintSpec, a JSON schema as a dict, a compiled `re` pattern,
    a type (scalars, Literal, Enum, containers, dataclasses, TypedDicts, pydantic models), or one of outlines' types.

    Raises ConstraintError for what is none of these, or cannot be expressed exactly.
    """
    if isinstance(value, ConstraintSpec):
        return value
    if isinstance(value, dict):
        return ConstraintSpec.json_schema(value)
    if isinstance(value, re.Pattern):
        return ConstraintSpec.regex(_pattern_text(value))
    # here, because they need pydantic and sometimes outlines, and the process that compiles neither
    from cadenza.decoding.constraints.python_types import spec_of_type

    return spec_of_type(value)


def check_combination(sampling: SamplingParams, eos_token_ids: Collection[int] = ()) -> None:
    """Raise RequestError for parameters that could end a constrained answer before it is complete, or keep it from
    ending. A `logit_bias` is allowed: it makes tokens unlikely, never impossible."""
    stop_ids = set(sampling.stop_token_ids).difference(eos_token_ids)
    cuts = "it could end the answer before it is complete"
    bans = "it could forbid every way to complete the answer"
    holds = "the answer may have to end earlier"
    asked: tuple[tuple[bool, str, str], ...] = (
        (bool(sampling.stop), "stop", cuts),
        (bool(stop_ids), "stop_token_ids", cuts),
        (sampling.ignore_eos, "ignore_eos", holds),
        (sampling.min_tokens > 0, "min_tokens", holds),
        (bool(sampling.bad_words), "bad_words", bans),
        (sampling.allowed_token_ids is not None, "allowed_token_ids", bans),
    )
    for given, name, reason in asked:
        if given:
            raise RequestError(f"{name} cannot be combined with a constraint on the output: {reason}.", name)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except RecursionError:
        raise ConstraintTooComplex("the constraint is nested too deeply") from None
    except ValueError as error:
        raise ConstraintError(f"the text is not valid JSON: {error}") from None


def _json_text(value: Any) -> str:
    """Equal values give equal texts. Members keep their order: answers are written in it."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ConstraintTooComplex("the constraint is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"the constraint cannot be written as JSON: {error}") from None


_INLINE_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")


def _pattern_text(pattern: "re.Pattern[Any]") -> str:
    """The pattern with its flags written in front."""
    text = pattern.pattern
    if not isinstance(text, str):
        raise ConstraintError("a regular expression over bytes cannot constrain a text")
    flags = ((re.I, "i"), (re.M, "m"), (re.S, "s"), (re.X, "x"), (re.A, "a"))
    letters = "".join(letter for flag, letter in flags if pattern.flags & flag)
    own = _INLINE_FLAGS.match(text)
    rest = text[own.end() :] if own else text  # the compiled flags include what the text itself says
    return f"(?{letters}){rest}" if letters else rest
