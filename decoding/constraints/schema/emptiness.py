"""Is there any value of a shape? Says yes when in doubt; a no is certain.

What is only possible for infinitely deep values counts as possible here: the finished grammar tells.
"""

from collections.abc import Callable
from dataclasses import replace

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.array_part import ArrayPart
from cadenza.decoding.constraints.schema.formula import FALSE, TRUE, Formula
from cadenza.decoding.constraints.schema.object_part import ObjectPart
from cadenza.decoding.constraints.schema.shape import Shape
from cadenza.decoding.constraints.schema.string_part import StringPart

_MAX_DEPTH = 8


class Emptiness:
    def __init__(self, shape: Callable[[Formula], Shape | None], effort: Effort) -> None:
        self._shape = shape
        self._effort = effort
        self._known: dict[Formula, bool] = {TRUE: False, FALSE: True}
        self._asked: list[Formula] = []
        self._expressions: dict[Expression, bool] = {}

    def is_empty(self, formula: Formula) -> bool:
        if formula in self._known:
            return self._known[formula]
        if formula in self._asked or len(self._asked) >= _MAX_DEPTH:
            return False
        self._effort.spend(4)
        self._asked.append(formula)
        try:
            shape = self._shape(formula)
            empty = shape is not None and self.prune(shape).is_nothing
        finally:
            self._asked.pop()
        if empty or not self._asked:
            self._known[formula] = empty
        return empty

    def is_empty_shape(self, shape: Shape) -> bool:
        return self.prune(shape).is_nothing

    def prune(self, shape: Shape) -> Shape:
        """Without the parts that no value belongs to."""
        return replace(
            shape,
            strings=tuple(part for part in shape.strings if not self.no_string(part)),
            arrays=tuple(part for part in shape.arrays if not self._no_array(part)),
            objects=tuple(part for part in shape.objects if not self._no_object(part)),
        )

    def no_string(self, part: StringPart) -> bool:
        if part.values is not None or part.only_length or part.num_conditions == 1:
            return part.values == ()
        return self.no_text(part.expression())

    def no_text(self, expression: Expression) -> bool:
        if expression not in self._expressions:
            self._expressions[expression] = to_dfa(expression, self._effort).is_empty
        return self._expressions[expression]

    def _no_array(self, part: ArrayPart) -> bool:
        if any(c.low and self.is_empty(c.item) for c in part.contains):
            return True
        if any(self.is_empty(item) for item in part.prefix[: part.low]):
            return True
        return part.low > len(part.prefix) and self.is_empty(part.rest)

    def _no_object(self, part: ObjectPart) -> bool:
        if any(self.is_empty(value) for value in part.values(part.required, self._effort)):
            return True
        return any(self.is_empty(formula) for _, formula in part.some)
