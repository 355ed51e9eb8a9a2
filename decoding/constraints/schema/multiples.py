"""Multiples of a step, in decimal notation. Knows no schemas."""

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.number_part import NumberPart


def multiples(
    part: NumberPart, notations: list[Expression], builder: GrammarBuilder, effort: Effort
) -> Symbol:
    raise ConstraintError("multipleOf is not supported here")
