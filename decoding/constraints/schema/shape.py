"""What values a schema allows: for each type of JSON a union of parts. A boolean algebra.

Parts are conjunctions of conditions on one value; what they ask of the values inside it stays unexpanded
(`Formula`), so that recursive schemas are finite. Knows no keywords.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.array_part import ArrayPart, Single
from cadenza.decoding.constraints.schema.number_part import NumberPart
from cadenza.decoding.constraints.schema.object_part import ObjectPart
from cadenza.decoding.constraints.schema.string_part import StringPart

MAX_PARTS = 4000

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Shape:
    null: bool = False
    booleans: frozenset[bool] = frozenset()
    numbers: tuple[NumberPart, ...] = ()
    strings: tuple[StringPart, ...] = ()
    arrays: tuple[ArrayPart, ...] = ()
    objects: tuple[ObjectPart, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return self == NOTHING


BOTH = frozenset({False, True})
NOTHING = Shape()
ANYTHING = Shape(True, BOTH, (NumberPart(),), (StringPart(),), (ArrayPart(),), (ObjectPart(),))


@dataclass(frozen=True, slots=True)
class Algebra:
    """Union, intersection and complement of shapes."""

    effort: Effort
    single: Single

    def union(self, one: Shape, two: Shape) -> Shape:
        return Shape(
            one.null or two.null,
            one.booleans | two.booleans,
            self._union(one.numbers, two.numbers, NumberPart()),
            self._union(one.strings, two.strings, StringPart()),
            self._union(one.arrays, two.arrays, ArrayPart()),
            self._union(one.objects, two.objects, ObjectPart()),
        )

    def intersection(self, one: Shape, two: Shape) -> Shape:
        strings = partial(StringPart.intersection, effort=self.effort)
        return Shape(
            one.null and two.null,
            one.booleans & two.booleans,
            self._product(one.numbers, two.numbers, NumberPart.intersection),
            self._product(one.strings, two.strings, strings),
            self._product(one.arrays, two.arrays, ArrayPart.intersection),
            self._product(one.objects, two.objects, ObjectPart.intersection),
        )

    def complement(self, shape: Shape) -> Shape:
        strings = partial(StringPart.intersection, effort=self.effort)
        arrays = partial(ArrayPart.complement, single=self.single)
        objects = partial(ObjectPart.complement, single=self.single)
        return Shape(
            not shape.null,
            BOTH - shape.booleans,
            self._others(shape.numbers, NumberPart(), NumberPart.complement, NumberPart.intersection),
            self._others(shape.strings, StringPart(), StringPart.complement, strings),
            self._others(shape.arrays, ArrayPart(), arrays, ArrayPart.intersection),
            self._others(shape.objects, ObjectPart(), objects, ObjectPart.intersection),
        )

    def _union(self, one: tuple[P, ...], two: tuple[P, ...], everything: P) -> tuple[P, ...]:
        parts = dict.fromkeys((*one, *two))
        if everything in parts:
            return (everything,)
        self._check(len(parts))
        return tuple(parts)

    def _product(
        self, one: Sequence[P], two: Sequence[P], intersection: Callable[[P, P], P | None]
    ) -> tuple[P, ...]:
        parts: dict[P, None] = {}
        for mine in one:
            for theirs in two:
                self.effort.spend(4)
                if (both := intersection(mine, theirs)) is not None:
                    parts[both] = None
            self._check(len(parts))
        return tuple(parts)

    def _others(
        self,
        parts: tuple[P, ...],
        everything: P,
        complement: Callable[[P], list[P]],
        intersection: Callable[[P, P], P | None],
    ) -> tuple[P, ...]:
        result: tuple[P, ...] = (everything,)
        for part in parts:
            result = self._product(result, complement(part), intersection)
        return result

    @staticmethod
    def _check(num_parts: int) -> None:
        if num_parts > MAX_PARTS:
            raise ConstraintTooComplex(f"the schema's alternatives combine to more than {MAX_PARTS}")
