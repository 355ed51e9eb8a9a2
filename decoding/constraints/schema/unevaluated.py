"""`unevaluatedProperties` and `unevaluatedItems`: what the keywords beside them, and within, have not spoken of.

Each part of a shape stands for one way to satisfy the schemas around it, and knows which keys and items those have
evaluated. That is exact as long as the parts of `anyOf` are told apart by who of its members holds.
"""

from dataclasses import replace
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.schema.array_part import ArrayPart
from cadenza.decoding.constraints.schema.formula import TRUE, Formula
from cadenza.decoding.constraints.schema.object_part import Keys, ObjectPart
from cadenza.decoding.constraints.schema.reading import LONGEST, Keywords
from cadenza.decoding.constraints.schema.shape import Shape


def is_used(schema: Any) -> bool:
    """Whether either keyword stands anywhere in a document."""
    stack = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if "unevaluatedProperties" in item or "unevaluatedItems" in item:
                return True
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return False


def mark_properties(keywords: Keywords, regions: list[tuple[Keys, Formula]]) -> frozenset[Keys | str]:
    """What the keywords for members evaluate. regions: those of `patternProperties` and `additionalProperties`."""
    if not keywords.context.marks_evaluated:
        return frozenset()
    return frozenset((*keywords.mapping("properties"), *(keys for keys, _ in regions)))


def picks_items(keywords: Keywords) -> bool:
    """Whether `contains` evaluates the items it matches, as it does since draft 2020-12."""
    context = keywords.context
    return context.marks_evaluated and "contains" in keywords and context.document.draft >= 2020


def mark_items(keywords: Keywords, num_prefix: int, remainder: str) -> int:
    if not keywords.context.marks_evaluated:
        return 0
    return LONGEST if remainder in keywords else num_prefix


def unmarked(shape: Shape) -> Shape:
    """For values: they evaluate nothing."""
    return replace(
        shape,
        arrays=tuple(replace(part, evaluated=0) for part in shape.arrays),
        objects=tuple(replace(part, evaluated=frozenset()) for part in shape.objects),
    )


def read_unevaluated(keywords: Keywords, shape: Shape) -> Shape:
    """What is left of the shape, once all other keywords have been read."""
    if "unevaluatedProperties" in keywords:
        formula = keywords.subschema("unevaluatedProperties")
        objects = (_object(part, formula) for part in shape.objects)
        shape = replace(shape, objects=tuple(part for part in objects if part is not None))
    if "unevaluatedItems" in keywords:
        if any(part.picked for part in shape.arrays):
            raise ConstraintError(
                "unevaluatedItems is not supported beside contains", keywords.where("unevaluatedItems")
            )
        formula = keywords.subschema("unevaluatedItems")
        arrays = (_array(part, formula) for part in shape.arrays)
        shape = replace(shape, arrays=tuple(part for part in arrays if part is not None))
    return shape


def _object(part: ObjectPart, formula: Formula) -> ObjectPart | None:
    evaluated = [keys for keys in part.evaluated if isinstance(keys, Keys)]
    names = frozenset(keys for keys in part.evaluated if isinstance(keys, str))
    if any(keys.exclude or keys.names or not keys.include for keys in evaluated):
        return part  # `additionalProperties` has evaluated what the others have not
    rest = Keys(exclude=frozenset(p for keys in evaluated for p in keys.include), names=names)
    others = ObjectPart(regions=((rest, formula),), evaluated=frozenset({Keys()}))
    return part.intersection(others)


def _array(part: ArrayPart, formula: Formula) -> ArrayPart | None:
    if part.evaluated >= LONGEST:
        return part
    return part.intersection(ArrayPart((TRUE,) * part.evaluated, formula, evaluated=LONGEST))
