"""Sets of objects as a schema describes them, closed under intersection and complement."""

from collections.abc import Iterable
from dataclasses import dataclass

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.array_part import Single
from cadenza.decoding.constraints.schema.formula import FALSE, TRUE, Formula, conjunction, negation
from cadenza.decoding.constraints.schema.pattern import Pattern, in_order


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that match every one of `include`, none of `exclude`, and are none of `names`."""

    include: frozenset[Pattern] = frozenset()
    exclude: frozenset[Pattern] = frozenset()
    names: frozenset[str] = frozenset()

    def possibly(self, name: str, effort: Effort) -> bool:
        """Whether some engine counts `name` among the keys."""
        if name in self.names or not all(p.possibly(name, effort) for p in self.include):
            return False
        return not any(p.surely(name, effort) for p in self.exclude)

    def surely(self, name: str, effort: Effort) -> bool:
        """Whether every engine counts `name` among the keys."""
        if name in self.names or not all(p.surely(name, effort) for p in self.include):
            return False
        return not any(p.possibly(name, effort) for p in self.exclude)

    def check_negatable(self) -> None:
        for pattern in in_order(self.exclude):
            if pattern.format is not None:
                name, where = pattern.format
                raise ConstraintError(f"format {name!r} is not supported where a schema is negated", where)


@dataclass(frozen=True, slots=True)
class ObjectPart:
    """The objects that meet every condition."""

    properties: tuple[tuple[str, Formula], ...] = ()
    """What the value under a name satisfies, if it is there. Each name once, in the order of writing."""
    regions: tuple[tuple[Keys, Formula], ...] = ()
    """What every value under one of the keys satisfies."""
    required: tuple[str, ...] = ()
    """Each name once, in the order of writing."""
    low: int = 0
    high: int | None = None
    some: frozenset[tuple[Keys, Formula]] = frozenset()
    """There is a member under one of the keys whose value satisfies the formula."""
    evaluated: frozenset[Keys | str] = frozenset()
    """Names and keys that `unevaluatedProperties` does not speak of. No condition; kept only where that is used."""

    def intersection(self, other: "ObjectPart") -> "ObjectPart | None":
        properties = dict(self.properties)
        for name, formula in other.properties:
            properties[name] = conjunction((properties.get(name, TRUE), formula))
        regions = dict(self.regions)
        for keys, formula in other.regions:
            regions[keys] = conjunction((regions.get(keys, TRUE), formula))
        required = tuple(dict.fromkeys((*self.required, *other.required)))
        highs = [high for high in (self.high, other.high) if high is not None]
        high = min(highs) if highs else None
        low = max(self.low, other.low)
        if any(properties.get(name) == FALSE for name in required):
            return None
        if high is not None and max(low, len(required)) > high:
            return None
        return ObjectPart(
            tuple(properties.items()),
            tuple(regions.items()),
            required,
            low,
            high,
            self.some | other.some,
            self.evaluated | other.evaluated,
        )

    def complement(self, single: Single) -> list["ObjectPart"]:
        parts: list[ObjectPart] = [ObjectPart(properties=((name, FALSE),)) for name in self.required]
        for name, formula in self.properties:
            for no in negation(formula):
                parts.append(ObjectPart(properties=((name, no),), required=(name,)))
        for keys, formula in self.regions:
            keys.check_negatable()
            for no in negation(formula):
                parts.append(ObjectPart(some=frozenset({(keys, no)})))
        for keys, formula in self.some:
            for no in negation(single(formula)):
                parts.append(ObjectPart(regions=((keys, no),)))
            if formula == TRUE:
                parts.append(ObjectPart(regions=((keys, FALSE),)))
        if self.low:
            parts.append(ObjectPart(high=self.low - 1))
        if self.high is not None:
            parts.append(ObjectPart(low=self.high + 1))
        return parts

    def names(self) -> list[str]:
        """Every name that the conditions treat on its own, in the order of writing."""
        mentioned: dict[str, None] = dict.fromkeys(name for name, _ in self.properties)
        mentioned.update(dict.fromkeys(self.required))
        keys: Iterable[Keys] = (*(k for k, _ in self.regions), *(k for k, _ in self.some))
        mentioned.update(dict.fromkeys(name for k in keys for name in sorted(k.names)))
        return list(mentioned)

    def values(self, names: Iterable[str], effort: Effort) -> list[Formula]:
        """What the value under each of the names satisfies, if it is there."""
        known = dict(self.properties)
        result = []
        for name in names:
            effort.spend()
            conditions = [formula for keys, formula in self.regions if keys.possibly(name, effort)]
            result.append(conjunction((known.get(name, TRUE), *conditions)))
        return result
