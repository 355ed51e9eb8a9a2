"""Compiling a schema and asking its grammar about texts and values."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions, schema_grammar


def _compile(schema: Any, options: SchemaOptions | None = None) -> CompiledGrammar:
    return compile_grammar(schema_grammar(schema, options or SchemaOptions(), Effort()), Effort())


def _accepts_text(grammar: CompiledGrammar, text: str) -> bool:
    parser = Parser(grammar)
    return parser.advance(text.encode()) and parser.is_complete


class _Writer:
    """Writes a value into a parser with the members of objects in whatever order it takes."""

    def __init__(self, grammar: CompiledGrammar, max_steps: int) -> None:
        self.parser = Parser(grammar)
        self.steps = max_steps

    def write(self, value: Any) -> bool:
        self.steps -= 1
        if isinstance(value, dict) and value:
            return self._within(lambda: self._text("{") and self._members(dict(value), first=True))
        if isinstance(value, list) and value:
            return self._within(lambda: self._text("[") and self._items(value) and self._text("]"))
        return self._text(json.dumps(value, ensure_ascii=False))

    def _text(self, text: str) -> bool:
        return self.parser.advance(text.encode())

    def _items(self, items: list[Any]) -> bool:
        return all((i == 0 or self._text(", ")) and self.write(item) for i, item in enumerate(items))

    def _members(self, members: dict[str, Any], first: bool) -> bool:
        if not members:
            return self._text("}")
        assert self.steps > 0, "too many orders of members to try"
        return any(self._within(partial(self._member_first, members, name, first)) for name in members)

    def _member_first(self, members: dict[str, Any], name: str, first: bool) -> bool:
        key = ("" if first else ", ") + json.dumps(name, ensure_ascii=False) + ": "
        rest = {other: value for other, value in members.items() if other != name}
        return self._text(key) and self.write(members[name]) and self._members(rest, first=False)

    def _within(self, attempt: Callable[[], bool]) -> bool:
        start = self.parser.num_bytes
        if attempt():
            return True
        self.parser.rollback(self.parser.num_bytes - start)
        return False


def _accepts_value(grammar: CompiledGrammar, value: Any, max_steps: int = 5000) -> bool:
    writer = _Writer(grammar, max_steps)
    return writer.write(value) and writer.parser.is_complete


@pytest.fixture(scope="session")
def compiled() -> Callable[..., CompiledGrammar]:
    """(schema, options) -> compiled grammar."""
    return _compile


@pytest.fixture(scope="session")
def accepts_text() -> Callable[[CompiledGrammar, str], bool]:
    """Whether the grammar derives exactly this text."""
    return _accepts_text


@pytest.fixture(scope="session")
def accepts_value() -> Callable[..., bool]:
    """Whether the grammar derives the value as `json.dumps` writes it, members in some order."""
    return _accepts_value
