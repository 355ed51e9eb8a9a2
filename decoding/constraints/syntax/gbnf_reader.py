"""Reads GBNF (llama.cpp) and the EBNF of xgrammar, which is nearly the same, into rules.

A rule ends where the next `name ::=` stands, so that alternatives may begin on a line of their own. Brackets are
kept on a stack of our own: a text nested deeply is refused by its depth, not by Python's.
"""

import re
from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import ANY_CHAR, CharSet, Expression, Literal
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.rules import Body, Group, Item, OpenGroup, Reference, count
from cadenza.decoding.constraints.syntax.source import Source

_SPACE = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")  # possessive: comments could be split in many ways
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DEFINITION = re.compile(r"([A-Za-z0-9_-]++)(?:[ \t\r\n]++|#[^\n]*+)*+::=")
_COUNT = re.compile(r"\{\s*(\d++)?\s*(,)?\s*(\d++)?\s*\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([^xuU]))", re.DOTALL)
_SHORT_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "f": "\f",
    "v": "\v",
    "a": "\a",
    "b": "\b",
    "0": "\0",
    "e": "\x1b",
}
_COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_MACROS = {"TagDispatch", "TokenTagDispatch", "Token", "ExcludeToken", "AnyToken", "AnyTokens"}


def read_gbnf(text: str, effort: Effort) -> tuple[Source, dict[str, Body]]:
    return (reader := _Reader(Source(text), effort)).source, reader.rules_of_text()


@dataclass(slots=True)
class _Reader:
    source: Source
    effort: Effort
    position: int = 0

    def rules_of_text(self) -> dict[str, Body]:
        rules: dict[str, Body] = {}
        self._skip_space()
        while self.position < len(self.source.text):
            start = self.position
            definition = _DEFINITION.match(self.source.text, start)
            if definition is None:
                raise self._error("a rule `name ::= ...` is expected")
            name = definition[1]
            if name in rules:
                raise self.source.error(f"rule {name!r} is defined twice", start)
            self.position = definition.end()
            rules[name] = self._body()
        return rules

    def _body(self) -> Body:
        opened = [OpenGroup(self.position)]
        while True:
            self.effort.spend()
            self._skip_space()
            character = self.source.text[self.position : self.position + 1]
            if not character or (character not in '"[](){}*+?.|' and self._at_definition()):
                break
            innermost = opened[-1]
            if character == "(":
                self._refuse_lookahead()
                opened.append(OpenGroup(self.position))
                self.effort.check_nesting(len(opened))
                self.position += 1
            elif character == ")":
                if len(opened) == 1:
                    raise self._error("a bracket is closed that was not opened")
                opened.pop()
                opened[-1].add(Group(innermost.body()))
                self.position += 1
            elif character == "|":
                innermost.next_option()
                self.position += 1
            elif character in "*+?{":
                self._repeat(innermost)
            else:
                innermost.add(self._item(character))
        if len(opened) > 1:
            raise self.source.error("the bracket is not closed", opened[-1].position)
        return opened[0].body()

    def _at_definition(self) -> bool:
        return _DEFINITION.match(self.source.text, self.position) is not None

    def _repeat(self, innermost: OpenGroup) -> None:
        if not innermost.may_repeat:
            raise self._error("there is nothing that the operator could repeat")
        low, high = self._counts()
        innermost.repeat(low, high)

    def _counts(self) -> tuple[int, int | None]:
        character = self.source.text[self.position]
        if character != "{":
            self.position += 1
            return _COUNTS[character]
        match = _COUNT.match(self.source.text, self.position)
        if match is None or not (match[1] or match[3]) or (match[3] and not match[2]):
            raise self._error("a count is {m}, {m,} or {m,n}")
        low = count(match[1] or "0")
        high = count(match[3]) if match[3] else None if match[2] else low
        if high is not None and high < low:
            raise self._error(f"{{{low},{high}}} counts backwards")
        self.position = match.end()
        return low, high

    def _item(self, character: str) -> Item:
        if character == '"':
            return self._literal()
        if character == "[":
            return self._char_class()
        if character == ".":
            self.position += 1
            return ANY_CHAR
        name = _NAME.match(self.source.text, self.position)
        if name is None:
            if character in "<!":
                raise self._error("tokens by name or number are not supported in grammars")
            if character == "/":
                raise self._error("regular expressions are not part of GBNF; write a class or a Lark grammar")
            raise self._error("an element is expected")
        if name[0] in _MACROS and self.source.text[name.end() : name.end() + 1] == "(":
            raise self._error(f"the macro {name[0]} is not supported")
        self.position = name.end()
        return Reference(name[0], name.start())

    def _literal(self) -> Expression:
        start = self.position
        self.position += 1
        characters: list[str] = []
        while (character := self._character(start, "string")) != '"':
            self.effort.spend()
            characters.append(self._escape() if character == "\\" else self._plain(character))
        self.position += 1
        return Literal("".join(characters))

    def _char_class(self) -> Expression:
        start = self.position
        self.position += 1
        is_negated = self.source.text.startswith("^", self.position)
        self.position += is_negated
        ranges: list[tuple[int, int]] = []
        while self._character(start, "class") != "]":
            self.effort.spend()
            first = last = self._class_character(start)
            if self._character(start, "class") == "-" and not self.source.text.startswith(
                "-]", self.position
            ):
                self.position += 1
                last = self._class_character(start)
                if last < first:
                    raise self.source.error("a range of characters runs backwards", start)
            ranges.append((first, last))
        self.position += 1
        if not ranges:
            raise self.source.error("the class of characters is empty", start)
        characters = CharSet.of(ranges)
        return characters.complement() if is_negated else characters

    def _class_character(self, start: int) -> int:
        character = self._character(start, "class")
        return ord(self._escape() if character == "\\" else self._plain(character))

    def _character(self, start: int, kind: str) -> str:
        if self.position >= len(self.source.text):
            raise self.source.error(f"the {kind} does not end", start)
        return self.source.text[self.position]

    def _plain(self, character: str) -> str:
        if "\ud800" <= character <= "\udfff":
            raise self._error("a surrogate is not a character")
        self.position += 1
        return character

    def _escape(self) -> str:
        match = _ESCAPE.match(self.source.text, self.position)
        if match is None:
            raise self._error("the escape is not complete")
        if match[4] is not None:
            if match[4].isalnum() and match[4] not in _SHORT_ESCAPES:
                raise self._error(f"the escape \\{match[4]} is not supported")
            character = _SHORT_ESCAPES.get(match[4], match[4])
        else:
            code = int(match[1] or match[2] or match[3], 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise self._error(f"{match[0]} is not a character")
            character = chr(code)
        self.position = match.end()
        return character

    def _refuse_lookahead(self) -> None:
        if self.source.text.startswith("(=", self.position):
            raise self._error("lookahead (= ...) is not supported")

    def _skip_space(self) -> None:
        match = _SPACE.match(self.source.text, self.position)
        if match is not None:
            self.effort.spend(1 + (match.end() - self.position) // 64)
            self.position = match.end()

    def _error(self, message: str) -> ConstraintError:
        return self.source.error(f"{message}, but found {self.source.near(self.position)}", self.position)
