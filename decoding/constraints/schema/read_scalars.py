"""The keywords on values as such, numbers and strings."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.schema import formats
from cadenza.decoding.constraints.schema.keywords import TYPES
from cadenza.decoding.constraints.schema.number_part import Bound, NumberPart, decimal, exact
from cadenza.decoding.constraints.schema.pattern import read_pattern
from cadenza.decoding.constraints.schema.reading import Keywords
from cadenza.decoding.constraints.schema.shape import ANYTHING, NOTHING, Shape
from cadenza.decoding.constraints.schema.string_part import StringPart
from cadenza.decoding.constraints.schema.unevaluated import unmarked

_LARGEST = 10**400
"""Beyond every double; the notation of such bounds is not worth its size."""


def read_type(keywords: Keywords) -> Shape:
    value = keywords.schema.get("type", [*TYPES])
    names = value if isinstance(value, list) else [value]
    shape = NOTHING
    for name in names:
        if not isinstance(name, str) or name not in TYPES:
            raise keywords.wrong("type", f"must be one of {', '.join(TYPES)}, not {name!r}")
        shape = keywords.context.algebra.union(shape, _of_type(name))
    return shape


def _of_type(name: str) -> Shape:
    match name:
        case "null":
            return Shape(null=True)
        case "boolean":
            return Shape(booleans=ANYTHING.booleans)
        case "integer":
            return Shape(numbers=(NumberPart(integral=True),))
        case "number":
            return Shape(numbers=ANYTHING.numbers)
        case "string":
            return Shape(strings=ANYTHING.strings)
        case "array":
            return Shape(arrays=ANYTHING.arrays)
        case _:
            return Shape(objects=ANYTHING.objects)


def read_values(keywords: Keywords) -> Shape:
    """`const` and `enum`."""
    shape = ANYTHING
    if "const" in keywords:
        shape = _values(keywords, [(keywords.schema["const"], ("const",))])
    if "enum" in keywords:
        values = keywords.schema["enum"]
        if not isinstance(values, list):
            raise keywords.wrong("enum", "must be an array")
        pairs: list[tuple[Any, tuple[str | int, ...]]] = [(v, ("enum", i)) for i, v in enumerate(values)]
        shape = keywords.context.algebra.intersection(shape, _values(keywords, pairs))
    return shape


def _values(keywords: Keywords, values: list[tuple[Any, tuple[str | int, ...]]]) -> Shape:
    null = False
    booleans: set[bool] = set()
    numbers: dict[NumberPart, None] = {}
    strings: dict[str, None] = {}
    composites = NOTHING
    for value, path in values:
        keywords.context.effort.spend()
        match value:
            case None:
                null = True
            case bool():
                booleans.add(value)
            case int() | float():
                numbers[NumberPart.point(exact(value))] = None
            case str():
                strings[value] = None
            case _:
                shape = keywords.context.shape(keywords.synthetic(_as_schema(value), *path))
                composites = keywords.context.algebra.union(composites, unmarked(shape))
    scalars = Shape(
        null, frozenset(booleans), tuple(numbers), (StringPart(values=tuple(strings)),) if strings else ()
    )
    return keywords.context.algebra.union(scalars, composites)


def _as_schema(value: Any) -> dict[str, Any]:
    """What an array or object says about itself, item by item."""
    if isinstance(value, list):
        items = [{"const": item} for item in value]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    members = {name: {"const": item} for name, item in value.items()}
    return {
        "type": "object", "properties": members, "required": list(members), "additionalProperties": False,
    }  # fmt: skip


def read_numbers(keywords: Keywords) -> Shape:
    part = NumberPart()
    for keyword, is_low in (("minimum", True), ("maximum", False)):
        part = _bounded(keywords, part, keyword, is_low)
    if (step := keywords.number("multipleOf")) is not None:
        if step <= 0:
            raise keywords.wrong("multipleOf", "must be greater than 0")
        part = replace(part, divisors=frozenset({decimal(step)}))
    numbers = () if part.is_empty() else (part,)
    return replace(ANYTHING, numbers=numbers)


def _bounded(keywords: Keywords, part: NumberPart, keyword: str, is_low: bool) -> NumberPart:
    exclusive = "exclusive" + keyword.capitalize()
    bounds: list[Bound] = []
    is_flag = isinstance(keywords.schema.get(exclusive), bool)
    if is_flag and keywords.context.document.draft > 4 and "$schema" in _root(keywords):
        raise keywords.wrong(exclusive, "must be a number")
    if (value := keywords.number(keyword)) is not None:
        bounds.append(Bound(exact(value), not (is_flag and keywords.schema[exclusive])))
    if not is_flag and (value := keywords.number(exclusive)) is not None:
        bounds.append(Bound(exact(value), False))
    for bound in bounds:
        if abs(bound.value) >= _LARGEST:
            raise ConstraintTooComplex(f"{keyword} has more than 400 digits", keywords.where(keyword))
        other = NumberPart(low=bound) if is_low else NumberPart(high=bound)
        part = _conjoined(part, other)
    return part


def _conjoined(one: NumberPart, two: NumberPart) -> NumberPart:
    """As an intersection, but keeps the conditions that contradict each other."""
    both = one.intersection(two)
    return both if both is not None else NumberPart(Bound(Fraction(1), True), Bound(Fraction(0), True))


def _root(keywords: Keywords) -> dict[str, Any]:
    root = keywords.context.document.root
    return root if isinstance(root, dict) else {}


def read_strings(keywords: Keywords) -> Shape:
    effort = keywords.context.effort
    part: StringPart | None = StringPart(low=keywords.least("minLength"), high=keywords.most("maxLength"))
    if (pattern := keywords.text("pattern")) is not None:
        include = frozenset({read_pattern(pattern, keywords.where("pattern"), effort)})
        part = part and StringPart(include=include).intersection(part, effort)
    if (name := keywords.text("format")) is not None and keywords.context.options.format_assertion:
        part = part and _formatted(keywords, name).intersection(part, effort)
    part = part and part.intersection(StringPart(), effort)
    return replace(ANYTHING, strings=() if part is None else (part,))


def _formatted(keywords: Keywords, name: str) -> StringPart:
    if name in formats.ANNOTATIONS:
        return StringPart()
    if name not in formats.PATTERNS:
        raise ConstraintError(f"format {name!r} is not supported", keywords.where("format"))
    return StringPart(formats=frozenset({(formats.format_expression(name), name, keywords.where("format"))}))
