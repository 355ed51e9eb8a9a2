"""Conjunctions of schemas and negated schemas: what is asked of one value. Knows nothing of what a schema says.

A schema is a number that `Document` gave out. There are finitely many of them, hence finitely many formulas:
that is why expanding recursive schemas ends.
"""

from collections.abc import Iterable
from typing import TypeAlias

Formula: TypeAlias = frozenset[tuple[int, bool]]
"""Pairs of a schema's number and True (the value satisfies it) or False (it does not)."""

NEVER = 0
"""The number of the schema `false`."""
TRUE: Formula = frozenset()
FALSE: Formula = frozenset({(NEVER, True)})


def conjunction(formulas: Iterable[Formula]) -> Formula:
    literals = frozenset().union(*formulas) - {(NEVER, False)}
    if any((schema, not holds) in literals for schema, holds in literals) or (NEVER, True) in literals:
        return FALSE
    return literals


def negation(formula: Formula) -> list[Formula]:
    """The formulas of which one holds where `formula` does not."""
    if formula == FALSE:
        return [TRUE]
    return [frozenset({(schema, not holds)}) for schema, holds in sorted(formula)]
