"""The keywords on objects."""

from dataclasses import replace

from cadenza.decoding.constraints.automata.expression import either
from cadenza.decoding.constraints.schema.formula import FALSE, Formula
from cadenza.decoding.constraints.schema.object_part import Keys, ObjectPart
from cadenza.decoding.constraints.schema.pattern import Pattern, read_pattern
from cadenza.decoding.constraints.schema.reading import Keywords
from cadenza.decoding.constraints.schema.shape import ANYTHING, NOTHING, Shape
from cadenza.decoding.constraints.schema.string_part import StringPart
from cadenza.decoding.constraints.schema.unevaluated import mark_properties


def read_objects(keywords: Keywords) -> Shape:
    properties = tuple(
        (name, keywords.subschema("properties", name)) for name in keywords.mapping("properties")
    )
    regions = [*_patterns(keywords), *_additional(keywords)]
    part = ObjectPart(
        properties,
        (*regions, *_key_schema(keywords)),
        tuple(keywords.names("required")),
        keywords.least("minProperties"),
        keywords.most("maxProperties"),
        evaluated=mark_properties(keywords, regions),
    ).intersection(ObjectPart())
    shape = replace(ANYTHING, objects=() if part is None else (part,))
    return _dependencies(keywords, shape)


def _pattern(keywords: Keywords, source: str) -> Pattern:
    return read_pattern(source, keywords.where("patternProperties", source), keywords.context.effort)


def _patterns(keywords: Keywords) -> list[tuple[Keys, Formula]]:
    return [
        (
            Keys(include=frozenset({_pattern(keywords, source)})),
            keywords.subschema("patternProperties", source),
        )
        for source in keywords.mapping("patternProperties")
    ]


def _additional(keywords: Keywords) -> list[tuple[Keys, Formula]]:
    if "additionalProperties" in keywords:
        formula = keywords.subschema("additionalProperties")
    elif not keywords.context.options.additional_properties and (
        "properties" in keywords or "patternProperties" in keywords
    ):
        formula = FALSE
    else:
        return []
    patterns = frozenset(_pattern(keywords, source) for source in keywords.mapping("patternProperties"))
    return [(Keys(exclude=patterns, names=frozenset(keywords.mapping("properties"))), formula)]


def _key_schema(keywords: Keywords) -> list[tuple[Keys, Formula]]:
    """`propertyNames`: under any other key nothing is allowed."""
    if "propertyNames" not in keywords:
        return []
    allowed = keywords.context.shape(keywords.subschema("propertyNames")).strings
    if allowed == (StringPart(),):
        return []
    if all(part.values is not None for part in allowed):
        names = frozenset(value for part in allowed for value in part.values or ())
        return [(Keys(names=names), FALSE)]
    pattern = Pattern(
        either(*(part.expression() for part in allowed)),
        either(*(part.expression(wide=True) for part in allowed)),
        next((f[1:] for part in allowed for f in sorted(part.formats, key=lambda f: f[1:])), None),
    )
    return [(Keys(exclude=frozenset({pattern})), FALSE)]


def _dependencies(keywords: Keywords, shape: Shape) -> Shape:
    """Per key: it is absent, or what depends on it holds."""
    algebra = keywords.context.algebra
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, value in keywords.mapping(keyword).items():
            absent = replace(ANYTHING, objects=(ObjectPart(properties=((name, FALSE),)),))
            if isinstance(value, list) and keyword != "dependentSchemas":
                demanded = tuple(dict.fromkeys((name, *keywords.names_at(keyword, name))))
                present = replace(NOTHING, objects=(ObjectPart(required=demanded),))
            elif keyword != "dependentRequired":
                present = replace(NOTHING, objects=(ObjectPart(required=(name,)),))
                present = algebra.intersection(
                    present, keywords.context.shape(keywords.subschema(keyword, name))
                )
            else:
                raise keywords.wrong(keyword, "must hold arrays of strings")
            shape = algebra.intersection(shape, algebra.union(absent, present))
    return shape
