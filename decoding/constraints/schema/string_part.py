"""Sets of strings as a schema describes them, closed under intersection and complement. Knows no JSON text."""

from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    And,
    Expression,
    Literal,
    Not,
    Repeat,
    either,
)
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.matching import matches
from cadenza.decoding.constraints.schema.pattern import Pattern, in_order


@dataclass(frozen=True, slots=True)
class StringPart:
    """The strings that meet every condition."""

    values: tuple[str, ...] | None = None
    """None: any."""
    include: frozenset[Pattern] = frozenset()
    exclude: frozenset[Pattern] = frozenset()
    excluded: frozenset[str] = frozenset()
    low: int = 0
    high: int | None = None
    formats: frozenset[tuple[Expression, str, str]] = frozenset()
    """Expression, name and place. What a format allows is a convention, so nothing is said about its complement."""

    def intersection(self, other: "StringPart", effort: Effort) -> "StringPart | None":
        values = self.values if self.values is not None else other.values
        if self.values is not None and other.values is not None:
            allowed = set(other.values)
            values = tuple(value for value in self.values if value in allowed)
        highs = [high for high in (self.high, other.high) if high is not None]
        both = StringPart(
            values,
            self.include | other.include,
            self.exclude | other.exclude,
            self.excluded | other.excluded,
            max(self.low, other.low),
            min(highs) if highs else None,
            self.formats | other.formats,
        )
        return both._simplified(effort)

    def _simplified(self, effort: Effort) -> "StringPart | None":
        if self.values is not None:
            effort.spend(len(self.values))
            values = tuple(value for value in self.values if self._admits(value, effort))
            return StringPart(values) if values else None
        if self.include & self.exclude or (self.high is not None and self.low > self.high):
            return None
        return self

    def _admits(self, value: str, effort: Effort) -> bool:
        if (
            value in self.excluded
            or len(value) < self.low
            or (self.high is not None and len(value) > self.high)
        ):
            return False
        return (
            all(matches(expression, value, effort) for expression, _, _ in self.formats)
            and all(pattern.surely(value, effort) for pattern in self.include)
            and not any(pattern.possibly(value, effort) for pattern in self.exclude)
        )

    def complement(self) -> list["StringPart"]:
        for _, name, where in sorted(self.formats, key=lambda f: f[2]):
            raise ConstraintError(f"format {name!r} is not supported where a schema is negated", where)
        parts: list[StringPart] = []
        if self.values is not None:
            parts.append(StringPart(excluded=frozenset(self.values)))
        parts.extend(StringPart(exclude=frozenset({p})) for p in in_order(self.include))
        parts.extend(StringPart(include=frozenset({p})) for p in in_order(self.exclude))
        if self.excluded:
            parts.append(StringPart(values=tuple(sorted(self.excluded))))
        if self.low:
            parts.append(StringPart(high=self.low - 1))
        if self.high is not None:
            parts.append(StringPart(low=self.high + 1))
        return parts

    @property
    def only_length(self) -> bool:
        return self.values is None and not (self.include or self.exclude or self.excluded or self.formats)

    @property
    def num_conditions(self) -> int:
        lengths = int(self.low > 0) + int(self.high is not None)
        return len(self.include) + len(self.exclude) + len(self.excluded) + len(self.formats) + lengths

    def expression(self, wide: bool = False) -> Expression:
        """The strings themselves, not their JSON text. wide: those of which any engine says that they belong."""
        if self.values is not None:
            return either(*(Literal(value) for value in self.values))
        conditions = [p.wide if wide else p.narrow for p in in_order(self.include)]
        conditions.extend(expression for expression, _, _ in sorted(self.formats, key=lambda f: f[1:]))
        if self.low or self.high is not None or not conditions:
            conditions.append(Repeat(ANY_CHAR, self.low, self.high))
        conditions.extend(Not(p.narrow if wide else p.wide) for p in in_order(self.exclude))
        if self.excluded:
            conditions.append(Not(either(*(Literal(value) for value in sorted(self.excluded)))))
        return conditions[0] if len(conditions) == 1 else And(tuple(conditions))
