"""Whether a grammar's language contains a text: our reading, compiled, and our parser."""

from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions
from cadenza.decoding.constraints.syntax import grammar_from_text, structural_tag_grammar


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    parser = Parser(grammar)
    return parser.advance(text.encode()) and parser.is_complete


@pytest.fixture
def grammar() -> Callable[[str], Callable[[str], bool]]:
    """From the text of a grammar to a judge of texts."""

    def judge(text: str) -> Callable[[str], bool]:
        compiled = compile_grammar(grammar_from_text(text, Effort()), Effort())
        return lambda candidate: accepts(compiled, candidate)

    return judge


@pytest.fixture
def tagged() -> Callable[[dict[str, Any]], Callable[[str], bool]]:
    """From the format of a structural tag, or the whole of an older one, to a judge of texts."""

    def judge(value: dict[str, Any]) -> Callable[[str], bool]:
        whole = value if "structures" in value else {"type": "structural_tag", "format": value}
        compiled = compile_grammar(structural_tag_grammar(whole, Effort(), SchemaOptions()), Effort())
        return lambda candidate: accepts(compiled, candidate)

    return judge
