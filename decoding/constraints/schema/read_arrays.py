"""The keywords on arrays."""

from dataclasses import replace

from cadenza.decoding.constraints.schema.array_part import ArrayPart, Contains
from cadenza.decoding.constraints.schema.formula import TRUE, Formula
from cadenza.decoding.constraints.schema.reading import Keywords
from cadenza.decoding.constraints.schema.shape import ANYTHING, Shape
from cadenza.decoding.constraints.schema.unevaluated import mark_items, picks_items


def read_arrays(keywords: Keywords) -> Shape:
    unique = keywords.schema.get("uniqueItems", False)
    if not isinstance(unique, bool):
        raise keywords.wrong("uniqueItems", "must be true or false")
    prefix, rest, remainder = _items(keywords)
    part = ArrayPart(
        prefix,
        rest,
        keywords.least("minItems"),
        keywords.most("maxItems"),
        _contains(keywords),
        unique=keywords.where("uniqueItems") if unique else None,
        evaluated=mark_items(keywords, len(prefix), remainder),
        picked=picks_items(keywords),
    ).intersection(ArrayPart())
    return replace(ANYTHING, arrays=() if part is None else (part,))


def _items(keywords: Keywords) -> tuple[tuple[Formula, ...], Formula, str]:
    """The first items, the others, and the keyword that speaks of these.

    Before draft 2020-12 an array of schemas in `items` was what is `prefixItems` now.
    """
    schema = keywords.schema
    if "prefixItems" in schema:
        if isinstance(schema.get("items"), list):
            raise keywords.wrong("items", "must be a schema beside prefixItems")
        prefix, remainder = "prefixItems", "items"
    elif isinstance(schema.get("items"), list):
        prefix, remainder = "items", "additionalItems"
    else:
        return (), _schema(keywords, "items"), "items"
    schemas = schema[prefix]
    if not isinstance(schemas, list):
        raise keywords.wrong(prefix, "must be an array of schemas")
    first = tuple(keywords.subschema(prefix, i) for i in range(len(schemas)))
    return first, _schema(keywords, remainder), remainder


def _schema(keywords: Keywords, keyword: str) -> Formula:
    return keywords.subschema(keyword) if keyword in keywords else TRUE


def _contains(keywords: Keywords) -> frozenset[Contains]:
    low, high = keywords.count("minContains"), keywords.most("maxContains")
    if "contains" not in keywords:
        return frozenset()
    low = 1 if low is None else low
    if low == 0 and high is None:
        return frozenset()
    return frozenset({Contains(0, keywords.subschema("contains"), low, high)})
