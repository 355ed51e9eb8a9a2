"""The parser on the grammar that it meets most, at the length of real answers. Counts work, not time."""

import json
import pickle

import pytest

from cadenza.decoding.constraints.automata.expression import (
    CharSet,
    Literal,
    Repeat,
    concat,
    optional,
    plus,
    star,
)
from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort

_DIGITS = plus(CharSet.chars("0123456789"))
_NUMBER = concat(optional(Literal("-")), _DIGITS, optional(concat(Literal("."), _DIGITS)))
_CHARACTER = CharSet.chars('"\\').union(CharSet.of([(0, 31)])).complement()
_STRING = concat(Literal('"'), star(_CHARACTER), Literal('"'))
_SPACE = Repeat(CharSet.chars(" \n"), 0, 2)


@pytest.fixture(scope="module")
def grammar() -> CompiledGrammar:
    builder = GrammarBuilder(Effort())
    words = [(Literal(word),) for word in ("true", "false", "null")]
    builder.add("value", [("object",), ("array",), (_STRING,), (_NUMBER,), *words])
    comma = builder.sequence(Literal(","), _SPACE)
    pair = builder.sequence(_STRING, _SPACE, Literal(":"), _SPACE, "value", _SPACE)
    builder.add("object", [(Literal("{"), _SPACE, builder.repeat(pair, 0, None, comma), Literal("}"))])
    item = builder.sequence("value", _SPACE)
    builder.add("array", [(Literal("["), _SPACE, builder.repeat(item, 0, None, comma), Literal("]"))])
    return compile_grammar(builder.build("value"), Effort())


def work(grammar: CompiledGrammar, text: bytes) -> int:
    parser = Parser(grammar)
    assert parser.advance(text)
    parser.min_bytes()
    return parser.num_items


def test_every_prefix_can_be_completed(grammar: CompiledGrammar) -> None:
    value = {"a": [1, -2.5, {"b": None, "é😀": [[], {}]}], "c": True, "d": "x y"}
    text = json.dumps(value, ensure_ascii=False).encode()
    for length in range(len(text) + 1):
        parser = Parser(grammar)
        assert parser.advance(text[:length])
        completion = parser.completion()
        assert len(completion) == parser.min_bytes()
        json.loads(text[:length] + completion)
    assert parser.is_complete
    assert parser.is_ended


def test_completions_are_the_shortest(grammar: CompiledGrammar) -> None:
    for text, expected in [
        ('{"a": [1, ', "0]}"),
        ('"x', '"'),
        ("{", "}"),
        ('{"a', '":0}'),
        ("tr", "ue"),
        ("-", "0"),
    ]:
        parser = Parser(grammar)
        assert parser.advance(text.encode())
        assert parser.completion() == expected.encode()


def test_a_refused_token_changes_nothing(grammar: CompiledGrammar) -> None:
    parser = Parser(grammar)
    assert parser.advance(b'{"a"')
    assert not parser.advance(b": 1,,")
    assert parser.num_bytes == 4
    assert parser.next_bytes() == b"\n :"
    assert parser.advance(b": 1}")
    assert parser.is_ended


def test_work_grows_with_what_is_new_in_a_text_not_with_its_length(grammar: CompiledGrammar) -> None:
    assert work(grammar, b"[" + b"1, " * 3_333 + b"1]") <= work(grammar, b"[" + b"1, " * 10 + b"1]")
    rows = json.dumps([{"id": i % 7, "tags": ["a", None]} for i in range(300)]).encode()
    assert work(grammar, rows) < 600
    string = b'"' + b"all sorts of letters " * 500 + b'"'
    assert work(grammar, string) < 100


def test_nesting_costs_the_same_at_every_depth(grammar: CompiledGrammar) -> None:
    shallow, deep = work(grammar, b"[" * 100), work(grammar, b"[" * 2_000)
    assert deep <= 20.5 * shallow
    parser = Parser(grammar)
    assert parser.advance(b'[{"a":' * 1_000)
    assert parser.completion() == b"0" + b"}]" * 1_000
    del parser  # long chains of nodes are given back without recursion


def test_a_compiled_grammar_crosses_processes(grammar: CompiledGrammar) -> None:
    assert pickle.loads(pickle.dumps(grammar)) == grammar
