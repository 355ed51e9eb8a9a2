"""The smaller pieces of a pattern's text: escapes, bracket expressions, repetition counts.

Reads what both dialects share and refuses by name what means different things in them. Knows nothing of groups.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal as OneOf
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import CharSet
from cadenza.decoding.constraints.automata.unicode_sets import category, fold_case, shorthand
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort

Dialect: TypeAlias = OneOf["python", "ecma"]

_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_COUNT = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")
_PROPERTY = re.compile(r"\{(\^?)([^{}]*)\}|([A-Z])")
_HIGHEST_COUNT = 10**9
_UNSUPPORTED = {
    **{letter: f"\\{letter}" for letter in "KRXGQEhH"},
    **dict.fromkeys("kg", "a backreference"),
}


@dataclass(frozen=True, slots=True)
class Flags:
    ignore_case: bool = False
    dot_all: bool = False
    multiline: bool = False
    verbose: bool = False
    ascii_only: bool = False


class Source:
    """A pattern and a place in it."""

    def __init__(self, pattern: str, dialect: Dialect, effort: Effort) -> None:
        self.pattern = pattern
        self.dialect = dialect
        self.effort = effort
        self.at = 0

    @property
    def more(self) -> bool:
        return self.at < len(self.pattern)

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if not self.peek(text):
            return False
        self.at += len(text)
        return True

    def next(self) -> str:
        if not self.more:
            raise self.error("the pattern ends too early", self.at)
        self.effort.spend()
        self.at += 1
        return self.pattern[self.at - 1]

    def until(self, end: str, start: int) -> str:
        place = self.pattern.find(end, self.at)
        if place < 0:
            raise self.error(f"there is no {end!r} to end this", start)
        text, self.at = self.pattern[self.at : place], place + len(end)
        return text

    def match(self, expression: "re.Pattern[str]") -> "re.Match[str] | None":
        found = expression.match(self.pattern, self.at)
        if found:
            self.at = found.end()
        return found

    def error(self, message: str, position: int) -> ConstraintError:
        return ConstraintError(message, where=f"position {position}")

    def refused(self, construct: str, position: int) -> ConstraintError:
        return self.error(f"{construct} is not supported in a pattern", position)


def read_count(source: Source) -> tuple[int, int | None] | None:
    """{m}, {m,}, {m,n} and Python's {,n}; None, and nothing read, if the brace is an ordinary character."""
    start = source.at
    found = source.match(_COUNT)
    if found is None:
        return None
    low, comma, high = found.groups()
    if not low and not comma:
        source.at = start
        return None
    if not low and source.dialect == "ecma":
        raise source.error("{,n} counts from zero in Python and is ordinary text in JavaScript", start)
    least = _number(low)
    most = least if not comma else _number(high) if high else None
    if most is not None and most < least:
        raise source.error(f"the repetition {found[0]} has its bounds the wrong way round", start)
    return least, most


def _number(digits: str) -> int:
    significant = digits.lstrip("0")
    return _HIGHEST_COUNT if len(significant) > 9 else int(significant or "0")


def read_escape(source: Source, flags: Flags, *, wide: bool, in_class: bool) -> str | CharSet:
    """After a backslash: one character, or a set. Anchors and boundaries are the parser's business."""
    start = source.at - 1
    letter = source.next()
    if letter in "dwsDWS":
        return shorthand(letter, wide=wide, ascii_only=flags.ascii_only)
    if letter in "pP":
        return _property(source, letter == "P", start)
    if letter in _CONTROL:
        return _CONTROL[letter]
    if letter == "b" and in_class:
        return "\b"
    if letter.isdigit() and letter.isascii():
        return _digits(source, letter, in_class, start)
    if letter in "xuU":
        return _code_point(source, letter, start)
    if letter == "c" and source.dialect == "ecma":
        control = source.next()
        if not (control.isascii() and control.isalpha()):
            raise source.error("\\c is not followed by a letter", start)
        return chr(ord(control) % 32)
    if letter == "a" and source.dialect == "python":
        return "\a"
    if letter == "N" and source.dialect == "python":
        return _named(source, start)
    if letter in _UNSUPPORTED:
        raise source.refused(_UNSUPPORTED[letter], start)
    if letter.isascii() and letter.isalnum():
        raise source.error(f"\\{letter} is not an escape", start)
    return letter


def _digits(source: Source, first: str, in_class: bool, start: int) -> str:
    """\\0, and Python's octal numbers; anything else is a backreference."""
    following = source.match(re.compile("[0-7]{0,2}"))
    rest = following[0] if following else ""
    if source.dialect == "ecma":
        if first == "0" and not rest and not source.peek("8") and not source.peek("9"):
            return "\0"
        raise source.refused("an octal escape" if first == "0" or in_class else "a backreference", start)
    if first == "0" or (first in "123" and len(rest) == 2) or (in_class and first in "1234567"):
        return chr(int(first + rest, 8))
    raise source.refused("a backreference", start)


def _code_point(source: Source, letter: str, start: int) -> str:
    if letter == "u" and source.dialect == "ecma" and source.take("{"):
        digits = source.until("}", start)
        if not re.fullmatch("0*[0-9a-fA-F]{1,6}", digits) or int(digits, 16) > 0x10FFFF:
            raise source.error("\\u{...} does not hold a code point", start)
        return chr(int(digits, 16))
    if letter == "U" and source.dialect == "ecma":
        raise source.error("\\U is not an escape", start)
    width = {"x": 2, "u": 4, "U": 8}[letter]
    code = _hexadecimal(source, letter, width, start)
    if 0xD800 <= code < 0xDC00 and source.dialect == "ecma" and letter == "u" and source.take("\\u"):
        low = _hexadecimal(source, letter, width, start)
        if not 0xDC00 <= low < 0xE000:
            raise source.error("\\u is half of a surrogate pair", start)
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    if code > 0x10FFFF:
        raise source.error("\\U is beyond the last code point", start)
    return chr(code)


def _hexadecimal(source: Source, letter: str, width: int, start: int) -> int:
    digits = source.pattern[source.at : source.at + width]
    if not re.fullmatch(f"[0-9a-fA-F]{{{width}}}", digits):
        raise source.error(f"\\{letter} is not followed by {width} hexadecimal digits", start)
    source.at += width
    return int(digits, 16)


def _named(source: Source, start: int) -> str:
    if not source.take("{"):
        raise source.error("\\N is not followed by the name of a character in braces", start)
    name = source.until("}", start)
    try:
        return unicodedata.lookup(name)
    except KeyError:
        raise source.error(f"\\N names no character: {name[:40]}", start) from None


def _property(source: Source, negated: bool, start: int) -> CharSet:
    found = source.match(_PROPERTY)
    if found is None:
        raise source.error("\\p is not followed by a property in braces", start)
    chars = category(found[2] if found[3] is None else found[3])
    if chars is None:
        raise source.refused(
            f"\\{'P' if negated else 'p'}{found[0][:40]}, which is no general category,", start
        )
    return chars.complement() if negated != (found[1] == "^") else chars


def read_class(source: Source, flags: Flags, *, wide: bool) -> CharSet:
    """After an opening bracket. The members of a negated class are read the other way, wide for narrow."""
    start = source.at - 1
    negated = source.take("^")
    inner = wide != negated
    parts: list[CharSet] = []
    first = source.dialect == "python"
    while first or not source.peek("]"):
        if not source.more:
            raise source.error("the bracket is not closed", start)
        if source.peek("[:") and source.pattern.find(":]", source.at) > 0:
            raise source.refused("a POSIX class", source.at)
        parts.append(_member(source, flags, inner))
        first = False
    source.next()
    chars = CharSet.of(char_range for part in parts for char_range in part.ranges)
    if flags.ignore_case:
        chars = fold_case(chars, wide=inner)
    return chars.complement() if negated else chars


def _member(source: Source, flags: Flags, wide: bool) -> CharSet:
    """A character, a set, or a range."""
    start = source.at
    low = _class_atom(source, flags, wide)
    if not source.peek("-") or source.peek("-]") or source.at + 1 >= len(source.pattern):
        return low if isinstance(low, CharSet) else CharSet.chars(low)
    source.next()
    high = _class_atom(source, flags, wide)
    if isinstance(low, CharSet) or isinstance(high, CharSet):
        if source.dialect == "python":
            raise source.error("a range has a class of characters as its end", start)
        ends = [CharSet.chars(end) if isinstance(end, str) else end for end in (low, high)]
        return ends[0].union(ends[1]).union(CharSet.chars("-"))
    if ord(low) > ord(high):
        raise source.error(f"the range {low}-{high} is the wrong way round", start)
    return CharSet.of([(ord(low), ord(high))])


def _class_atom(source: Source, flags: Flags, wide: bool) -> str | CharSet:
    character = source.next()
    return read_escape(source, flags, wide=wide, in_class=True) if character == "\\" else character
