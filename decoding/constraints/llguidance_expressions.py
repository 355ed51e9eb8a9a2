"""Expressions as llguidance's Lark dialect writes terminals.

Complement is by bytes there, so it is always met with all texts of characters. Parts that occur in several places
are terminals of their own: an expression may share parts, and be exponentially long when written out.
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
)
from cadenza.decoding.constraints.limits import Effort

_ANY_TEXT = "/(?s:.)*/"
_NO_TEXT = f"~{_ANY_TEXT} & {_ANY_TEXT}"
_LARGE_SET = 16
"""Ranges of a set that is worth a name."""


class TerminalPrinter:
    """Collects the definitions of terminals. Operands that are no plain regular expressions get names."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self.lines: list[str] = []
        self._atoms: dict[int, str] = {}
        self._sets: dict[CharSet, str] = {}
        self._names: dict[str, str] = {}
        self._kept: list[Expression] = []
        """So that no other object gets the identity of one that was printed."""

    def atom(self, expression: Expression) -> str:
        """A string, a regular expression between slashes, or a name: to be used in rules and terminals."""
        known = self._atoms.get(id(expression))
        if known is None:
            self._kept.append(expression)
            known = self._atoms[id(expression)] = self._new_atom(expression)
        return known

    def _new_atom(self, expression: Expression) -> str:
        self._effort.spend(4)
        if isinstance(expression, Literal):
            return _string(expression.text)
        if isinstance(expression, CharSet):
            return self._set(expression)
        plain = _regex(expression, self._effort)
        return self._name(f"/{plain}/" if plain is not None else self._composed(expression))

    def _name(self, definition: str) -> str:
        """The terminal that is so defined; equal definitions are one."""
        name = self._names.setdefault(definition, f"T{len(self._names)}")
        if len(self._names) > len(self.lines):
            self.lines.append(f"{name}: {definition}")
        return name

    def _set(self, chars: CharSet) -> str:
        if chars not in self._sets:
            self._sets[chars] = self._name(f"/{_char_class(chars)}/" if chars.ranges else _NO_TEXT)
        return self._sets[chars]

    def _composed(self, expression: Expression) -> str:
        match expression:
            case Concat(parts):
                return " ".join(map(self.atom, parts)) or '""'
            case Alternation(()):
                return _NO_TEXT
            case Repeat(_, low, high) if high is not None and high < low:
                return _NO_TEXT
            case Alternation(options):
                return " | ".join(map(self.atom, options))
            case And(parts):
                return " & ".join(map(self.atom, parts))
            case Not(body):
                return f"~{self.atom(body)} & {_ANY_TEXT}"
            case Repeat(body, low, high):
                return f"({self.atom(body)}){_counts(low, high)}"
            case _:
                raise AssertionError(expression)


_MAX_PLAIN = 256
"""Parts of an expression that is written out as one regular expression."""


def _regex(expression: Expression, effort: Effort) -> str | None:
    """In the syntax of Rust's regex crate; None if it needs operators that this lacks, or is too large."""
    if not _is_plain(expression):
        return None
    return _written(expression)


def _is_plain(expression: Expression) -> bool:
    budget = _MAX_PLAIN
    pending = [expression]
    while pending:
        part = pending.pop()
        budget -= 1
        match part:
            case Concat(parts) | Alternation(parts):
                if not parts or (len(parts) > budget and not all(isinstance(p, Literal) for p in parts)):
                    return False
                pending.extend(p for p in parts if not isinstance(p, Literal))
            case Repeat(body, low, high):
                if high is not None and high < low:
                    return False
                pending.append(body)
            case CharSet(ranges):
                if (len(ranges) > _LARGE_SET and part is not expression) or not ranges:
                    return False
            case And() | Not():
                return False
        if budget < 0:
            return False
    return True


def _written(expression: Expression) -> str:
    match expression:
        case Literal(text):
            return "".join(map(_char, text)) or "(?:)"
        case CharSet():
            return _char_class(expression)
        case Concat(parts):
            return "".join(f"(?:{_written(p)})" if isinstance(p, Alternation) else _written(p) for p in parts)
        case Alternation(options):
            return "|".join(map(_written, options))
        case Repeat(body, low, high):
            inner = _written(body)
            single = isinstance(body, CharSet) or (isinstance(body, Literal) and len(body.text) == 1)
            return (inner if single else f"(?:{inner})") + _counts(low, high)
        case _:
            raise AssertionError(expression)


def _counts(low: int, high: int | None) -> str:
    match low, high:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case 0, 1:
            return "?"
        case _, None:
            return f"{{{low},}}"
        case _:
            return f"{{{low},{high}}}" if low != high else f"{{{low}}}"


def _char_class(chars: CharSet) -> str:
    ranges = (f"{_char(chr(a))}-{_char(chr(b))}" if a != b else _char(chr(a)) for a, b in chars.ranges)
    return f"[{''.join(ranges)}]"


def _char(character: str) -> str:
    if character.isascii() and character.isalnum():
        return character
    return f"\\x{{{ord(character):X}}}"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
