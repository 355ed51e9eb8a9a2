"""The terminals between values, whitespace included. Knows no schemas.

Whitespace belongs to the bracket, comma or colon beside it, so that a grammar has few terminals and none of them
is ambiguous; an empty array or object is one terminal, because its whitespace belongs to neither bracket.
"""

from dataclasses import dataclass

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    And,
    CharSet,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    optional,
    star,
)
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.json_text import spelling

_INDENTATION = either(Repeat(Literal(" "), 0, 32), Repeat(Literal("\t"), 1, 16))
_BOUNDED = either(EPSILON, Literal(" "), concat(Literal("\n"), _INDENTATION))


@dataclass(frozen=True, slots=True)
class Brackets:
    open: Expression
    close: Expression
    empty: Expression


@dataclass(frozen=True, slots=True)
class Punctuation:
    array: Brackets
    object: Brackets
    comma: Expression
    colon: Expression

    def key(self, name: str) -> Expression:
        return _glued(Literal(f'"{spelling(name)}"'), self.colon)

    def keys(self, quoted: Expression) -> Expression:
        return _glued(quoted, self.colon)


def punctuation(whitespace: Expression | None, effort: Effort) -> Punctuation:
    if whitespace is None:
        return _punctuation(_BOUNDED, before=EPSILON, after_colon=optional(Literal(" ")))
    if whitespace != EPSILON:
        _check_whitespace(whitespace, effort)
    return _punctuation(whitespace, before=whitespace, after_colon=whitespace)


def _punctuation(space: Expression, before: Expression, after_colon: Expression) -> Punctuation:
    return Punctuation(
        _brackets("[", "]", space),
        _brackets("{", "}", space),
        _glued(before, Literal(","), space),
        _glued(before, Literal(":"), after_colon),
    )


def _brackets(first: str, last: str, space: Expression) -> Brackets:
    return Brackets(
        _glued(Literal(first), space),
        _glued(space, Literal(last)),
        _glued(Literal(first), space, Literal(last)),
    )


def _check_whitespace(whitespace: Expression, effort: Effort) -> None:
    if to_dfa(whitespace, effort).is_empty:
        raise ConstraintError("the whitespace pattern matches nothing")
    if not to_dfa(And((whitespace, Not(star(CharSet.chars(" \t\n\r"))))), effort).is_empty:
        raise ConstraintError("the whitespace pattern matches more than spaces, tabs and line breaks")


def _glued(*parts: Expression) -> Expression:
    """Concatenation with neighbouring literals joined."""
    result: list[Expression] = []
    for part in parts:
        if isinstance(part, Literal) and result and isinstance(result[-1], Literal):
            result[-1] = Literal(result[-1].text + part.text)
        elif part != EPSILON:
            result.append(part)
    return concat(*result)
