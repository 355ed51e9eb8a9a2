"""The keywords that combine schemas about the same value."""

from cadenza.decoding.constraints.schema.formula import Formula, negation
from cadenza.decoding.constraints.schema.reading import Keywords
from cadenza.decoding.constraints.schema.shape import NOTHING, Shape


def read_logic(keywords: Keywords, shape: Shape) -> Shape:
    """What is left of `shape`."""
    context = keywords.context
    meet = context.algebra.intersection
    if "$ref" in keywords:
        shape = meet(shape, context.shape(keywords.reference()))
    for i in range(len(keywords.schemas("allOf"))):
        shape = meet(shape, context.shape(keywords.subschema("allOf", i)))
    if "anyOf" in keywords:
        shape = meet(shape, _any(keywords, _members(keywords, "anyOf"), shape))
    if "oneOf" in keywords:
        shape = _one(keywords, _members(keywords, "oneOf"), shape)
    if "not" in keywords:
        shape = meet(shape, _not(keywords, keywords.subschema("not")))
    if "if" in keywords and ("then" in keywords or "else" in keywords or context.marks_evaluated):
        shape = _conditional(keywords, shape)
    return shape


def _members(keywords: Keywords, keyword: str) -> list[Formula]:
    return [keywords.subschema(keyword, i) for i in range(len(keywords.schemas(keyword)))]


def _any(keywords: Keywords, members: list[Formula], shape: Shape) -> Shape:
    context = keywords.context
    if context.marks_evaluated:
        return _any_apart(keywords, members, shape)
    union = NOTHING
    for member in members:
        both = context.algebra.intersection(shape, context.shape(member))
        union = context.algebra.union(union, both)
    return union


def _any_apart(keywords: Keywords, members: list[Formula], shape: Shape) -> Shape:
    """The same, with parts that are told apart by which members hold."""
    context = keywords.context
    held, unheld = NOTHING, shape
    for member in members:
        yes, no = context.shape(member), _not(keywords, member)
        union, meet = context.algebra.union, context.algebra.intersection
        held = context.prune(union(union(meet(held, yes), meet(held, no)), meet(unheld, yes)))
        unheld = context.prune(meet(unheld, no))
    return held


def _not(keywords: Keywords, formula: Formula) -> Shape:
    union = NOTHING
    for no in negation(formula):
        union = keywords.context.algebra.union(union, keywords.context.shape(no))
    return union


def _one(keywords: Keywords, members: list[Formula], shape: Shape) -> Shape:
    """Exactly one. Members that exclude each other anyway need no negation, which keeps the parts few."""
    context = keywords.context
    meet = context.algebra.intersection
    shapes = [meet(shape, context.shape(member)) for member in members]
    overlaps: list[list[int]] = [[] for _ in members]
    for i, mine in enumerate(shapes):
        for j in range(i):
            context.effort.spend(4)
            if not context.is_empty_shape(meet(mine, shapes[j])):
                overlaps[i].append(j)
                overlaps[j].append(i)
    union = NOTHING
    for i, mine in enumerate(shapes):
        for j in overlaps[i]:
            mine = context.prune(meet(mine, _not(keywords, members[j])))
        union = context.algebra.union(union, mine)
    return union


def _conditional(keywords: Keywords, shape: Shape) -> Shape:
    context = keywords.context
    meet = context.algebra.intersection
    condition = keywords.subschema("if")
    met = meet(shape, context.shape(condition))
    unmet = meet(shape, _not(keywords, condition))
    if "then" in keywords:
        met = meet(met, context.shape(keywords.subschema("then")))
    if "else" in keywords:
        unmet = meet(unmet, context.shape(keywords.subschema("else")))
    return context.algebra.union(met, unmet)
