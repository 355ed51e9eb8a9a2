"""The keys of an object that its schema does not name, in classes: keys of one class have the same conditions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import And, Expression, Literal, Not, either
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.formula import FALSE, Formula, conjunction
from cadenza.decoding.constraints.schema.json_text import ANY_STRING, encode, quoted
from cadenza.decoding.constraints.schema.object_part import Keys, ObjectPart
from cadenza.decoding.constraints.schema.pattern import Pattern, in_order
from cadenza.decoding.constraints.schema.texts import few_texts

_MAX_CLASSES = 64
_MAX_FEW = 32
"""A class of no more keys can be written out name by name."""


@dataclass(frozen=True, slots=True)
class _Class:
    """The keys that match these patterns in every engine, and those in none."""

    include: frozenset[Pattern] = frozenset()
    exclude: frozenset[Pattern] = frozenset()

    def within(self, keys: Keys) -> bool:
        return keys.include <= self.include and keys.exclude <= self.exclude

    def expression(self, names: Sequence[str]) -> Expression | None:
        """None: any string."""
        conditions = [p.narrow for p in in_order(self.include)]
        conditions.extend(Not(p.wide) for p in in_order(self.exclude))
        if names:
            conditions.append(Not(either(*(Literal(name) for name in names))))
        if not conditions:
            return None
        return conditions[0] if len(conditions) == 1 else And(tuple(conditions))


@dataclass(slots=True)
class FreeKeys:
    """Classes of keys whose values satisfy one formula."""

    value: Formula
    classes: list[_Class] = field(default_factory=list)
    expressions: list[Expression | None] = field(default_factory=list)

    def surely_in(self, keys: Keys) -> bool:
        return any(one.within(keys) for one in self.classes)

    def quoted(self, effort: Effort) -> Expression:
        known = [e for e in self.expressions if e is not None]
        if len(known) < len(self.expressions):
            return ANY_STRING
        return quoted(encode(either(*known), effort))

    def few(self, effort: Effort) -> list[str]:
        """The keys, if they are few; else none."""
        known = [e for e in self.expressions if e is not None]
        if len(known) < len(self.expressions):
            return []
        return few_texts(to_dfa(either(*known), effort), _MAX_FEW) or []


def free_keys(
    part: ObjectPart, names: Sequence[str], is_empty: Callable[[Expression], bool], effort: Effort
) -> list[FreeKeys]:
    """Every key but `names`, by the values that they allow."""
    result: dict[object, FreeKeys] = {}
    for one in _classes(part, names, is_empty, effort):
        value = conjunction(formula for keys, formula in part.regions if one.within(keys))
        if value == FALSE:
            continue
        group = (value, one) if part.some else value
        keys = result.setdefault(group, FreeKeys(value))
        keys.classes.append(one)
        keys.expressions.append(one.expression(names))
    return list(result.values())


def _classes(
    part: ObjectPart, names: Sequence[str], is_empty: Callable[[Expression], bool], effort: Effort
) -> list[_Class]:
    everything = (*part.regions, *part.some)
    patterns = in_order({p for keys, _ in everything for p in (*keys.include, *keys.exclude)})
    classes = [_Class()]
    for pattern in patterns:
        halves = []
        for one in classes:
            halves.append(_Class(one.include | {pattern}, one.exclude))
            halves.append(_Class(one.include, one.exclude | {pattern}))
        classes = []
        for half in halves:
            effort.spend(4)
            expression = half.expression(names)
            if expression is None or not is_empty(expression):
                classes.append(half)
        if len(classes) > _MAX_CLASSES:
            raise ConstraintTooComplex(f"patternProperties overlap in more than {_MAX_CLASSES} ways")
    return classes
