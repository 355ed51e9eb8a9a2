"""Expressions as llguidance's Lark dialect writes terminals.

Complement is by bytes there, so it always meets something that matches only texts of characters. Parts that occur
in several places are terminals of their own: an expression may share parts, and be exponentially long when written
out.
"""

import json

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import (
    ANY_TEXT,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    either,
)
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_automata import few_words, is_suffix_free

_ANY_TEXT = "/(?s:.)*/"
_NO_TEXT = f"~{_ANY_TEXT} & {_ANY_TEXT}"
_LARGE_SET = 16
"""Ranges of a set that is worth a name."""
_MAX_WORDS = 8


class TerminalPrinter:
    """Collects the definitions of terminals. Operands that are no plain regular expressions get names."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self.lines: list[str] = []
        self._atoms: dict[int, str] = {}
        self._sets: dict[CharSet, str] = {}
        self._names: dict[str, str] = {}
        self._tails: dict[Concat, Expression | None] = {}
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
            case Concat():
                return " ".join(map(self.atom, self._with_tail(expression))) or '""'
            case Alternation(()):
                return _NO_TEXT
            case Repeat(_, low, high) if high is not None and high < low:
                return _NO_TEXT
            case Alternation(options):
                return " | ".join(map(self.atom, options))
            case And() | Not():
                return self._intersection(expression)
            case Repeat(body, low, high):
                return f"({self.atom(body)}){_counts(low, high)}"
            case _:
                raise AssertionError(expression)

    def _with_tail(self, concatenation: Concat) -> list[Expression]:
        """The parts, with what follows an intersection drawn into it: (X & ~Y) Z as XZ & ~(YZ).

        The same where no text of Z ends in another one. llguidance then sees sooner that all short tokens of some
        kind may follow, and need not be tried one by one.
        """
        parts = _flat(concatenation)
        for index, part in enumerate(parts[:-1]):
            if not isinstance(part, And | Not):
                continue
            tail = self._drawn(Concat(tuple(parts[index + 1 :])))
            if tail is None:
                break
            positive, negative = _operands(part)
            drawn = [Concat((p, tail)) for p in positive or [ANY_TEXT]]
            return [*parts[:index], And((*drawn, *(Not(Concat((n, tail))) for n in negative)))]
        return parts

    def _drawn(self, tail: Concat) -> Expression | None:
        """The tail as it is to be drawn into an intersection, None if it must not be.

        Words are told apart: llguidance simplifies "b|bc" where it does not simplify "bc?".
        """
        if tail not in self._tails:
            dfa = to_dfa(tail, self._effort)
            words = few_words(dfa, _MAX_WORDS)
            plain = tail if words is None else either(*(Literal(word.decode()) for word in words))
            self._tails[tail] = plain if is_suffix_free(dfa, self._effort) else None
        return self._tails[tail]

    def _intersection(self, expression: And | Not) -> str:
        """Without `_ANY_TEXT` where it is not needed: llguidance cannot simplify it away while it matches."""
        positive, negative = _operands(expression)
        atoms = [*(map(self.atom, positive) if positive else [_ANY_TEXT])]
        return " & ".join([*atoms, *(f"~{self.atom(part)}" for part in negative)])


def _flat(concatenation: Concat) -> list[Expression]:
    parts: list[Expression] = []
    for part in concatenation.parts:
        parts.extend(_flat(part) if isinstance(part, Concat) else [part])
    return parts


def _operands(expression: And | Not) -> tuple[list[Expression], list[Expression]]:
    """What a text must match, and what it must not."""
    positive: list[Expression] = []
    negative: list[Expression] = []
    pending: list[Expression] = [expression]
    while pending:
        match part := pending.pop():
            case And(parts):
                pending.extend(reversed(parts))
            case Not(body):
                negative.append(body)
            case _:
                positive.append(part)
    return positive, negative


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
