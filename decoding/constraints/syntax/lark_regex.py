"""The literals of Lark grammars, strings and regular expressions, to expressions.

A terminal matches what its regular expression matches by itself. What would look at the text around it (anchors,
word boundaries, lookaround) is refused. Lazy quantifiers mean the shortest match, as they do for a lexer: if no
greedy one stands beside them, that is each text of which no beginning matches already.
"""

import re
from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    And,
    CharSet,
    Expression,
    Literal,
    Not,
    concat,
    plus,
)
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.source import Source

_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([nftr"\\]))')
_SHORT = {"n": "\n", "f": "\f", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_PIECE = re.compile(
    r"""(?P<escape>\\.)
    |(?P<char_class>\[\^?\]?(?:\\.|[^\]\\])*+\])
    |(?P<look>\(\?(?:=|!|<=|<!))
    |(?P<anchor>[$^])
    |(?P<extension>\(\?[a-zA-Z:<]*+)
    |(?P<quantifier>[*+?]|\{\d*+(?P<variable>,)?+\d*+\})(?P<lazy>\?)?+
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(slots=True)
class Literals:
    """Strings and regular expressions of one grammar."""

    source: Source
    effort: Effort
    narrowed: set[Expression] = field(default_factory=set)
    """Those that Python's reading would let match more, such as \\d: their complement would be too large."""

    def string(self, quoted: str, position: int) -> Expression:
        """Of `"text"` or `"text"i`."""
        text = string_value(quoted, self.source, position)
        if not text:
            raise self.source.error("a string in a grammar is not empty", position)
        if quoted.endswith("i"):
            return self._parsed(f"(?i:{re.escape(text)})", position)[0]
        return Literal(text)

    def char_range(self, first: str, last: str, position: int) -> Expression:
        """Of `"a".."z"`."""
        low, high = string_value(first, self.source, position), string_value(last, self.source, position)
        if len(low) != 1 or len(high) != 1 or first.endswith("i") or last.endswith("i"):
            raise self.source.error("a range goes from one character to another", position)
        if low > high:
            raise self.source.error("the range runs backwards", position)
        return CharSet.of([(ord(low), ord(high))])

    def regexp(self, quoted: str, position: int) -> Expression:
        """Of `/pattern/flags`."""
        end = quoted.rindex("/")
        pattern, flags = quoted[1:end], set(quoted[end + 1 :]) - {"u"}
        if "l" in flags:
            raise self.source.error("the flag l (locale) is not supported", position)
        if "\n" in pattern and "x" not in flags:
            raise self.source.error("a regular expression without the flag x stands on one line", position)
        is_lazy = _check_pieces(pattern, self.source, position, self.effort)
        prefix = f"(?{''.join(sorted(flags))})" if flags else ""
        narrow, wide = self._parsed(prefix + pattern, position)
        return And((narrow, Not(concat(wide, plus(ANY_CHAR))))) if is_lazy else narrow

    def _parsed(self, pattern: str, position: int) -> tuple[Expression, Expression]:
        try:
            narrow = parse_regex(pattern, "python", self.effort)
            wide = parse_regex(pattern, "python", self.effort, negated=True)
        except ConstraintTooComplex:
            raise
        except ConstraintError as error:
            raise self.source.error(f"in the regular expression: {error.message}", position) from None
        if narrow != wide:
            self.narrowed.add(narrow)
        return narrow, wide


def string_value(quoted: str, source: Source, position: int) -> str:
    """With Lark's escapes: a backslash before any other character stands for itself."""
    inner = quoted[1 : quoted.rindex('"')]
    value, end = [], 0
    for match in _ESCAPE.finditer(inner):
        value.append(inner[end : match.start()])
        code = match[1] or match[2] or match[3]
        if code is None:
            value.append(_SHORT[match[4]])
        elif int(code, 16) > 0x10FFFF:
            raise source.error(f"{match[0]} is not a character", position)
        else:
            value.append(chr(int(code, 16)))
        end = match.end()
    text = "".join([*value, inner[end:]])
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise source.error("the string contains a surrogate, which is not a character", position)
    return text


def _check_pieces(pattern: str, source: Source, position: int, effort: Effort) -> bool:
    """Whether quantifiers are lazy. Refuses what depends on the text around the terminal."""
    lazy = greedy = False
    for piece in _PIECE.finditer(pattern):
        effort.spend()
        refused = None
        match piece.lastgroup:
            case "look":
                refused = f"lookaround {piece[0]}...)"
            case "anchor":
                refused = f"the anchor {piece[0]}"
            case "escape" if piece[0][1] in "bBAZz":
                refused = f"the assertion {piece[0]}"
            case "quantifier" | "lazy":
                lazy |= piece["lazy"] is not None
                is_fixed = piece["quantifier"].startswith("{") and not piece["variable"]
                greedy |= piece["lazy"] is None and not is_fixed
        if refused is not None:
            raise source.error(
                f"{refused} is not supported in a grammar: it depends on the text around the terminal",
                position,
            )
    if lazy and greedy:
        raise source.error(
            "lazy quantifiers beside greedy ones are not supported in a grammar; "
            'exclude what ends the text instead, as in "[^"]*"',
            position,
        )
    return lazy
