"""From expressions over strings to expressions over the JSON text of these strings.

Every character has one canonical spelling: itself, or its escape where JSON demands one (the short escape if there
is one, else `\\u00XX` in lower case, as `json.dumps(ensure_ascii=False)` writes). No spelling is a prefix of
another, so the translation is one-to-one, keeps concatenation, union and intersection, and turns complement into
complement within the canonical texts. Knows nothing of schemas.
"""

import json

from cadenza.decoding.constraints.automata.expression import (
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    star,
)
from cadenza.decoding.constraints.limits import Effort

QUOTE = Literal('"')

_ESCAPED = CharSet.of([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))])
_RAW = _ESCAPED.complement()
_HEX = CharSet.of([(ord("0"), ord("9")), (ord("a"), ord("f")), (ord("A"), ord("F"))])


def _any_string_character() -> Expression:
    """Every spelling that JSON allows; surrogates only in pairs, so that the text denotes characters."""
    d = CharSet.chars("dD")
    high = Concat((d, CharSet.chars("89abAB"), _HEX, _HEX))
    low = Concat((d, CharSet.chars("cdefCDEF"), _HEX, _HEX))
    plain = either(
        Concat((CharSet.chars("0123456789abcefABCEF"), _HEX, _HEX, _HEX)),
        Concat((d, CharSet.chars("01234567"), _HEX, _HEX)),
    )
    escape = either(
        CharSet.chars('"\\/bfnrt'),
        concat(Literal("u"), either(plain, concat(high, Literal("\\u"), low))),
    )
    return either(_RAW, concat(Literal("\\"), escape))


def spelling(text: str) -> str:
    """The canonical text of a string, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def encode(expression: Expression, effort: Effort, depth: int = 0) -> Expression:
    """What the canonical texts of the strings look like that `expression` matches, without the quotes."""
    effort.spend()
    effort.check_nesting(depth)
    match expression:
        case Literal(text):
            return Literal(spelling(text))
        case CharSet():
            return _encode_set(expression)
        case Concat(parts):
            return Concat(tuple(encode(part, effort, depth + 1) for part in parts))
        case Alternation(options):
            return Alternation(tuple(encode(option, effort, depth + 1) for option in options))
        case Repeat(body, low, high):
            return Repeat(encode(body, effort, depth + 1), low, high)
        case And(parts):
            return And(tuple(encode(part, effort, depth + 1) for part in parts))
        case Not(body):
            return And((CANONICAL_TEXT, Not(encode(body, effort, depth + 1))))


def _encode_set(characters: CharSet) -> Expression:
    raw = characters.intersection(_RAW)
    escaped = characters.intersection(_ESCAPED)
    codes = [code for first, last in escaped.ranges for code in range(first, last + 1)]
    if not codes:
        return raw
    spellings = tuple(Literal(spelling(chr(code))) for code in codes)
    return Alternation((raw, *spellings) if raw.ranges else spellings)


def _canonical_character() -> Expression:
    """The same language as `_encode_set(ANY_CHAR)`, written briefly."""
    short = CharSet.chars('"\\bfnrt')
    control = either(
        concat(Literal("0"), either(CharSet.chars("01234567"), CharSet.chars("bef"))),
        concat(Literal("1"), CharSet.chars("0123456789abcdef")),
    )
    return either(_RAW, concat(Literal("\\"), either(short, concat(Literal("u00"), control))))


CANONICAL_CHARACTER = _canonical_character()
CANONICAL_TEXT = star(CANONICAL_CHARACTER)
ANY_STRING = concat(QUOTE, star(_any_string_character()), QUOTE)
"""A whole JSON string with its quotes, escapes written in any way."""


def quoted(text: Expression) -> Expression:
    return concat(QUOTE, text, QUOTE)
