"""Reads Lark's grammar language into rules, terminals and what is ignored; resolves no names.

With llguidance's `&` and `~` inside terminals, and its `%json {...}` inside rules. Its attributes and special tokens
are refused by name. What only shapes the tree (`?rule`, `!rule`, aliases) or only chooses among parses (priorities)
does not change the language, and is read and dropped.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.lark_common import common_terminal
from cadenza.decoding.constraints.syntax.lark_regex import Literals
from cadenza.decoding.constraints.syntax.lark_tokens import Token, Tokens
from cadenza.decoding.constraints.syntax.rules import Body, Group, Item, OpenGroup, Reference, count
from cadenza.decoding.constraints.syntax.source import Source

_COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_GOES_ON = re.compile(r"[ \t\f\r]*+\|")
_DECODER = json.JSONDecoder()
_CLOSING = {"(": ")", "[": "]"}
_REFUSED_DIRECTIVES = ("%declare", "%override", "%extend", "%regex", "%lark", "%grammar")


@dataclass(frozen=True, slots=True)
class Template:
    parameters: tuple[str, ...]
    body: Body
    position: int


@dataclass(slots=True)
class LarkGrammar:
    """What a text defines. Names are unique over all kinds; terminals are upper case, all others lower."""

    source: Source
    literals: Literals
    rules: dict[str, Body] = field(default_factory=dict)
    templates: dict[str, Template] = field(default_factory=dict)
    terminals: dict[str, Body] = field(default_factory=dict)
    ignored: list[Body] = field(default_factory=list)
    schemas: dict[str, tuple[Any, int]] = field(default_factory=dict)
    """JSON schemas written in place and where they stand, by the name that refers to them."""


def read_lark(text: str, effort: Effort) -> LarkGrammar:
    source = Source(text)
    grammar = LarkGrammar(source, Literals(source, effort))
    _Reader(Tokens(source, effort), grammar, effort).read()
    return grammar


@dataclass(slots=True)
class _Reader:
    tokens: Tokens
    grammar: LarkGrammar
    effort: Effort

    def read(self) -> None:
        tokens = self.tokens
        tokens.skip_newlines()
        while tokens.peek().kind != "end":
            self.effort.spend()
            if tokens.peek().kind == "directive":
                self._directive()
            else:
                self._definition()
            if tokens.peek().kind != "end":
                tokens.expect("newline", "another element, `|` or the end of the line")
            tokens.skip_newlines()

    def _definition(self) -> None:
        tokens = self.tokens
        while tokens.peek().kind in ("?", "!"):
            tokens.take()
        if tokens.peek().kind not in ("rule", "terminal"):
            raise tokens.error("a rule, a terminal or a directive is expected")
        name = tokens.take()
        if self._is_defined(name.text):
            raise tokens.source.error(f"{name.text!r} is defined twice", name.position)
        parameters = self._parameters() if tokens.peek().kind == "{" and name.kind == "rule" else None
        if tokens.peek().kind == "[":
            raise tokens.error(f"attributes of {name.text!r} in brackets are not supported")
        if tokens.take_if("."):
            tokens.expect("number", "a priority")
        tokens.expect(":", f"`:` after {name.text!r}")
        body = self._body(is_terminal=name.kind == "terminal")
        if name.kind == "terminal":
            self.grammar.terminals[name.text] = body
        elif parameters is not None:
            self.grammar.templates[name.text] = Template(parameters, body, name.position)
        else:
            self.grammar.rules[name.text] = body

    def _is_defined(self, name: str) -> bool:
        grammar = self.grammar
        return name in grammar.rules or name in grammar.terminals or name in grammar.templates

    def _parameters(self) -> tuple[str, ...]:
        self.tokens.take()
        names = [self.tokens.expect("rule", "the name of a parameter").text]
        while self.tokens.take_if(","):
            self.effort.spend()
            names.append(self.tokens.expect("rule", "the name of a parameter").text)
        self.tokens.expect("}", "`,` or `}`")
        return tuple(names)

    def _directive(self) -> None:
        name = self.tokens.peek()
        match name.text:
            case "%ignore":
                self.tokens.take()
                self.grammar.ignored.append(self._body(is_terminal=True))
            case "%import":
                self.tokens.take()
                self._import()
            case "%llguidance":
                self.tokens.take()
                value = self._json()
                if value != {}:
                    raise self.tokens.source.error("options of %llguidance are not supported", name.position)
            case text if text in _REFUSED_DIRECTIVES:
                raise self.tokens.source.error(f"{text} is not supported", name.position)
            case _:
                raise self.tokens.error("a directive is expected")

    def _import(self) -> None:
        tokens = self.tokens
        start = tokens.peek()
        if start.kind == ".":
            raise tokens.error("only `common` can be imported from")
        library = tokens.expect("rule", "the name of a library")
        if library.text != "common":
            raise tokens.source.error(
                f"only `common` can be imported from, not {library.text!r}", library.position
            )
        if tokens.take_if("("):
            names = [tokens.expect("terminal", "the name of a terminal")]
            while tokens.take_if(","):
                self.effort.spend()
                names.append(tokens.expect("terminal", "the name of a terminal"))
            tokens.expect(")", "`,` or `)`")
            for name in names:
                self._import_common(name, name)
            return
        tokens.expect(".", "`.` or `(`")
        name = tokens.expect("terminal", "the name of a terminal")
        self._import_common(name, tokens.expect("terminal", "a name") if tokens.take_if("->") else name)

    def _import_common(self, name: Token, alias: Token) -> None:
        expression = common_terminal(name.text, self.effort)
        if expression is None:
            raise self.tokens.source.error(f"`common` has no terminal {name.text!r}", name.position)
        body: Body = ((expression,),)
        if self._is_defined(alias.text) and self.grammar.terminals.get(alias.text) != body:
            raise self.tokens.source.error(f"{alias.text!r} is defined twice", alias.position)
        self.grammar.terminals[alias.text] = body

    def _body(self, *, is_terminal: bool) -> Body:
        """Up to the end of the definition. Brackets on a stack of our own: depth is a limit, not a crash."""
        opened = [OpenGroup(self.tokens.position)]
        while (token := self._next(is_nested=len(opened) > 1)) is not None:
            self.effort.spend()
            self._step(opened, token, is_terminal)
        if len(opened) > 1:
            raise self.tokens.source.error("the bracket is not closed", opened[-1].position)
        if opened[0].is_negated:
            raise self.tokens.error("an element after `~` is expected")
        return opened[0].body()

    def _next(self, *, is_nested: bool) -> Token | None:
        """None at the end of the definition: of its line, unless the next one goes on with `|`."""
        while True:
            token = self.tokens.peek()
            if token.kind == "end":
                return None
            if token.kind != "newline":
                return self.tokens.take()
            end = token.position + len(token.text)
            if not is_nested and not _GOES_ON.match(self.tokens.source.text, end):
                return None
            self.tokens.take()

    def _step(self, opened: list[OpenGroup], token: Token, is_terminal: bool) -> None:
        innermost = opened[-1]
        match token.kind:
            case "(" | "[":
                opened.append(OpenGroup(token.position, _CLOSING[token.kind]))
                self.effort.check_nesting(len(opened))
            case ")" | "]":
                if token.kind != innermost.closing or innermost.is_negated:
                    raise self._unexpected(token)
                opened.pop()
                opened[-1].add(Group(innermost.body(), 1 if token.kind == ")" else 0, 1))
            case "|" if not innermost.is_negated:
                innermost.next_option()
            case "&" if is_terminal and innermost.items and not innermost.is_negated:
                innermost.next_operand()
            case "~" if innermost.may_repeat and self.tokens.peek().kind == "number":
                innermost.repeat(*self._counts())
            case "~" if is_terminal and not innermost.is_negated:
                innermost.is_negated = True
            case "*" | "+" | "?" if innermost.may_repeat:
                innermost.repeat(*_COUNTS[token.kind])
            case "->" if not is_terminal:
                self._alias()
            case _:
                innermost.add(self._item(token, is_terminal))

    def _alias(self) -> None:
        self.tokens.expect("rule", "the name of an alias")
        if self.tokens.peek().kind not in ("|", ")", "]", "newline", "end"):
            raise self.tokens.error("the end of the alternative is expected after its alias")

    def _counts(self) -> tuple[int, int]:
        first = self.tokens.take()
        last = self.tokens.expect("number", "a number") if self.tokens.take_if("..") else first
        low, high = count(first.text), count(last.text)
        if low < 0 or high < low:
            raise self.tokens.source.error(f"{low}..{high} is not a number of repetitions", first.position)
        return low, high

    def _item(self, token: Token, is_terminal: bool) -> Item:
        literals = self.grammar.literals
        match token.kind:
            case "string" if self.tokens.peek().kind == "..":
                self.tokens.take()
                last = self.tokens.expect("string", "the last character of the range")
                return literals.char_range(token.text, last.text, token.position)
            case "string":
                return literals.string(token.text, token.position)
            case "regexp":
                return literals.regexp(token.text, token.position)
            case "terminal":
                return Reference(token.text, token.position)
            case "rule" if is_terminal:
                raise self.tokens.source.error(
                    f"rule {token.text!r} stands in a terminal, which may use terminals only", token.position
                )
            case "rule":
                return Reference(token.text, token.position, self._arguments(1))
            case "directive" if token.text == "%json" and not is_terminal:
                name = f"%json@{token.position}"
                self.grammar.schemas[name] = (self._json(), token.position)
                return Reference(name, token.position)
        raise self._unexpected(token)

    def _unexpected(self, token: Token) -> ConstraintError:
        if token.kind in ("&", "~"):
            return self.tokens.source.error(f"{token.kind} is only possible inside terminals", token.position)
        if token.kind == "directive":
            return self.tokens.source.error(f"{token.text} is not supported here", token.position)
        return self.tokens.source.error(f"{token.text!r} is out of place here", token.position)

    def _arguments(self, depth: int) -> tuple[Item, ...]:
        """Of a template; none if no brace follows."""
        if not self.tokens.take_if("{"):
            return ()
        self.effort.check_nesting(depth)
        arguments: list[Item] = []
        while True:
            self.effort.spend()
            token = self.tokens.take()
            if token.kind == "rule":
                arguments.append(Reference(token.text, token.position, self._arguments(depth + 1)))
            else:
                arguments.append(self._item(token, is_terminal=False))
            if not self.tokens.take_if(","):
                break
        self.tokens.expect("}", "`,` or `}`")
        return tuple(arguments)

    def _json(self) -> Any:
        source, start = self.tokens.source, self.tokens.position
        while source.text[start : start + 1].isspace():
            start += 1
        try:
            value, self.tokens.position = _DECODER.raw_decode(source.text, start)
        except RecursionError:
            raise ConstraintTooComplex("the JSON is nested too deeply", source.where(start)) from None
        except json.JSONDecodeError as error:
            raise source.error(f"JSON is expected: {error.msg}", error.pos) from None
        return value
