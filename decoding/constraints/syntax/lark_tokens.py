"""Cuts a grammar in Lark's language into tokens, on demand. Knows nothing of how they go together."""

import re
from dataclasses import dataclass, field

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.source import Source

# Possessive throughout: nothing here is worth a second look, and hostile texts would ask for many.
_TOKEN = re.compile(
    r"""(?P<newline>(?:[ \t\f\r]*+(?://[^\n]*+|\#[^\n]*+)?\n)++)
    |(?P<string>"(?:\\.|[^"\\\n])*+"i?)
    |(?P<regexp>/(?!/)(?:\\(?:.|\n)|[^/\\])++/[imslux]*+)
    |(?P<name>_*+[A-Za-z][A-Za-z0-9_]*+)
    |(?P<number>[+-]?\d++)
    |(?P<directive>%[a-z]++)
    |(?P<mark>->|\.\.|[]:|()[{},.*+?~!&])""",
    re.VERBOSE,
)
_SPACE = re.compile(r"(?:[ \t\f\r]++|\\[ ]*+\n)*+(?:(?://|\#)[^\n]*+\Z)?")


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    """newline, string, regexp, rule, terminal, number, directive, end; a mark is its own kind."""
    text: str
    position: int


@dataclass(slots=True)
class Tokens:
    source: Source
    effort: Effort
    position: int = 0
    _next: Token | None = field(default=None)

    def peek(self) -> Token:
        if self._next is None:
            self._next = self._read()
        return self._next

    def take(self) -> Token:
        token = self.peek()
        self._next = None
        self.position = token.position + len(token.text)
        return token

    def take_if(self, kind: str) -> Token | None:
        return self.take() if self.peek().kind == kind else None

    def expect(self, kind: str, what: str) -> Token:
        if self.peek().kind != kind:
            raise self.error(f"{what} is expected")
        return self.take()

    def skip_newlines(self) -> None:
        while self.take_if("newline"):
            self.effort.spend()

    def error(self, message: str) -> ConstraintError:
        """About the next token."""
        position = self.peek().position
        return self.source.error(f"{message}, but found {self.source.near(position)}", position)

    def _read(self) -> Token:
        text = self.source.text
        match = _TOKEN.match(text, self.position)
        if match is None or match.lastgroup != "newline":  # a newline token begins with its own space
            space = _SPACE.match(text, self.position)
            start = space.end() if space is not None else self.position
            match = _TOKEN.match(text, start) if start != self.position or match is None else match
            if start >= len(text):
                return Token("end", "", len(text))
        else:
            start = self.position
        if match is None or match.lastgroup is None:
            raise self._unreadable(start)
        self.effort.spend(1 + len(match[0]) // 64)
        kind = match.lastgroup
        if kind == "mark":
            kind = match[0]
        elif kind == "name":
            kind = self._kind_of_name(match[0], start)
        return Token(kind, match[0], start)

    def _kind_of_name(self, name: str, position: int) -> str:
        if name == name.lower():
            return "rule"
        if name == name.upper():
            return "terminal"
        raise self.source.error(
            f"the name {name!r} is neither a rule (all lower case) nor a terminal (all upper case)", position
        )

    def _unreadable(self, position: int) -> ConstraintError:
        match self.source.text[position]:
            case '"':
                return self.source.error("the string does not end on its line", position)
            case "/":
                return self.source.error("the regular expression does not end", position)
            case "<":
                return self.source.error("special tokens <...> are not supported in grammars", position)
            case "@":
                return self.source.error("references @... to other grammars are not supported", position)
            case "'":
                return self.source.error("strings are written in double quotes", position)
        return self.source.error(f"found {self.source.near(position)}, which begins nothing", position)
