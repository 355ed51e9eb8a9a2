"""The spelling of JSON: whitespace, escapes, the order of members, keys that come twice."""

import json

import pytest

from cadenza.decoding.constraints.automata.expression import EPSILON, CharSet, Literal, Repeat, star
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.schema import SchemaOptions

ITEM = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {}}}
VALUE = {"a": [1, 2], "b": {"c": {}, "d": []}}


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_the_usual_layouts(indent, compiled, accepts_text):
    assert accepts_text(compiled(ITEM), json.dumps(VALUE, indent=indent))
    assert accepts_text(compiled(ITEM), json.dumps(VALUE, separators=(",", ":")))


@pytest.mark.parametrize(
    "text",
    [
        '{"a" :[]}',
        '{"a":  []}',
        '{"a":[1 ,2]}',
        '{  "a":[]}',
        '{"a":[]}\n',
        ' {"a":[]}',
        '{"a":[1,\n\n2]}',
        '{"a":[   ]}',
    ],
)
def test_whitespace_is_bounded(text, compiled, accepts_text):
    json.loads(text)
    assert not accepts_text(compiled(ITEM), text)


def test_no_run_of_whitespace_is_longer_than_an_indentation(compiled):
    parser = Parser(compiled({"type": "object"}))
    assert parser.advance(b"{\n" + b" " * 32)
    assert not parser.advance(b" ")
    assert not parser.advance(b"\n")


def test_compact(compiled, accepts_text):
    grammar = compiled(ITEM, SchemaOptions(whitespace=EPSILON))
    assert accepts_text(grammar, json.dumps(VALUE, separators=(",", ":")))
    assert not accepts_text(grammar, json.dumps(VALUE))


def test_whitespace_of_ones_own_stands_around_every_sign(compiled, accepts_text):
    grammar = compiled(ITEM, SchemaOptions(whitespace=star(CharSet.chars(" \n"))))
    assert accepts_text(grammar, '{ "a"  :\n[ 1 ,   2 ]  ,"b":[  ] }')
    assert not accepts_text(grammar, '{\t"a":[]}')
    wide = compiled(ITEM, SchemaOptions(whitespace=Repeat(Literal(" "), 1, 1)))
    assert accepts_text(wide, '{ "a" : [ ] }')
    assert not accepts_text(wide, '{"a":[]}')


@pytest.mark.parametrize("whitespace", [Literal("x"), CharSet.chars(" ,"), CharSet(())])
def test_whitespace_must_be_whitespace(whitespace, compiled):
    with pytest.raises(ConstraintError, match="whitespace pattern"):
        compiled(ITEM, SchemaOptions(whitespace=whitespace))


@pytest.mark.parametrize(
    "text", [r'"\u00e9"', r'"\ud83d\ude00"', r'"\/\b\f\n\r\t\"\\"', '"é😀\x7f"', r'"\u0000"', '""']
)
def test_free_strings_may_be_escaped_in_any_way(text, compiled, accepts_text):
    assert accepts_text(compiled({"type": "string"}), text)
    assert accepts_text(compiled({}), text)


@pytest.mark.parametrize(
    "text", [r'"\ud83d"', r'"\ude00"', r'"\ud83d\ud83d"', r'"\x41"', '"\n"', r'"\u12"', '"', '"\\"']
)
def test_no_string_is_malformed(text, compiled, accepts_text):
    for schema in ({"type": "string"}, {"type": "string", "minLength": 1}, {"not": {"const": "a"}}):
        assert not accepts_text(compiled(schema), text)


def test_restricted_strings_have_one_spelling(compiled, accepts_text):
    grammar = compiled({"type": "string", "maxLength": 2})
    for value in ("a", '"\\', "\n\t", "\x00\x1f", "é😀", "/"):
        assert accepts_text(grammar, json.dumps(value, ensure_ascii=False))
    assert not accepts_text(grammar, r'"\u0061"')
    assert not accepts_text(grammar, r'"\/"')
    negated = compiled({"type": "string", "not": {"const": "\x01"}})
    assert not accepts_text(negated, r'"\u0001"')
    assert accepts_text(negated, r'"\u0002"')


def test_members_come_in_the_order_of_the_schema(compiled, accepts_text):
    schema = {"type": "object", "required": ["z", "b"], "properties": {"b": {}, "a": {}}}
    grammar = compiled(schema)
    assert accepts_text(grammar, '{"b": 1, "a": 2, "z": 3, "free": 4}')
    assert not accepts_text(grammar, '{"a": 2, "b": 1, "z": 3}')
    assert not accepts_text(grammar, '{"free": 4, "b": 1, "a": 2, "z": 3}')


def test_named_members_come_once(compiled, accepts_text):
    grammar = compiled({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert not accepts_text(grammar, '{"a": 1, "a": 2}')
    assert not accepts_text(grammar, '{"a": 1, "b": 1, "a": "x"}')
    assert not accepts_text(grammar, r'{"a": 1, "\u0061": "x"}')


def test_a_free_member_that_must_be_there_comes_last(compiled, accepts_text):
    """A reader keeps the last of equal keys, so nothing may replace the value that counts."""
    grammar = compiled({"type": "object", "not": {"additionalProperties": {"type": "integer"}}})
    assert accepts_text(grammar, '{"b": 1, "a": "x"}')
    assert not accepts_text(grammar, '{"a": "x", "a": 1}')


def test_any_json_is_a_small_grammar(compiled):
    from cadenza.decoding.constraints.limits import Effort
    from cadenza.decoding.constraints.schema import schema_grammar

    assert len(schema_grammar({"type": "object"}, SchemaOptions(), Effort()).rules) < 12


def test_additional_properties_can_be_off_by_default(compiled, accepts_text):
    schema = {"type": "object", "properties": {"a": {"type": "object"}, "b": {"properties": {"c": {}}}}}
    grammar = compiled(schema, SchemaOptions(additional_properties=False))
    assert accepts_text(grammar, '{"a": {"free": 1}, "b": {"c": 1}}')
    assert not accepts_text(grammar, '{"x": 1}')
    assert not accepts_text(grammar, '{"b": {"d": 1}}')
    allowed = compiled({**schema, "additionalProperties": True}, SchemaOptions(additional_properties=False))
    assert accepts_text(allowed, '{"x": 1}')
