"""Regular expressions in schemas. Engines differ on a few characters; a pattern is read both ways."""

from collections.abc import Iterable
from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.matching import matches


@dataclass(frozen=True, slots=True)
class Pattern:
    narrow: Expression
    """The strings that match in every engine."""
    wide: Expression
    """The strings that match in some engine."""
    format: tuple[str, str] | None = None
    """Name and place of a format that takes part, about whose complement nothing is known."""

    def surely(self, text: str, effort: Effort) -> bool:
        return matches(self.narrow, text, effort)

    def possibly(self, text: str, effort: Effort) -> bool:
        return matches(self.wide, text, effort)


def read_pattern(source: str, where: str, effort: Effort) -> Pattern:
    try:
        narrow = parse_regex(source, "ecma", effort, unanchored=True)
        wide = parse_regex(source, "ecma", effort, unanchored=True, negated=True)
    except ConstraintTooComplex:
        raise
    except ConstraintError as error:
        raise ConstraintError(f"pattern {source!r}: {error}", where) from None
    return Pattern(narrow, wide)


def in_order(patterns: Iterable[Pattern]) -> list[Pattern]:
    """Sets of patterns in an order that does not change from run to run."""
    return sorted(patterns, key=repr)
