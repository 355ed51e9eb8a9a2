"""A choice among given texts as an expression. Knows nothing of how the options were sent."""

from collections.abc import Sequence

from cadenza.decoding.constraints.automata.expression import Alternation, Expression, Literal
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort


def choice_expression(options: Sequence[str], effort: Effort) -> Expression:
    """Exactly one of the options; one that stands twice counts once."""
    if not isinstance(options, list | tuple):
        raise ConstraintError("a choice is a list of strings")
    if not options:
        raise ConstraintError("a choice needs at least one option")
    distinct: dict[str, None] = {}
    for number, option in enumerate(options):
        effort.spend()
        if not isinstance(option, str):
            raise ConstraintError("an option of a choice is a string", f"#/{number}")
        if not option:
            raise ConstraintError("an option of a choice is not empty", f"#/{number}")
        if any("\ud800" <= character <= "\udfff" for character in option):
            raise ConstraintError("an option contains half of a surrogate pair", f"#/{number}")
        distinct[option] = None
    return Alternation(tuple(Literal(option) for option in distinct))
