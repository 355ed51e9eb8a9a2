"""Structural tags: each format, and free text against a plain scan for the marker that is complete first."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions
from cadenza.decoding.constraints.syntax import structural_tag_grammar

Judge = Callable[[dict[str, Any]], Callable[[str], bool]]

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "tag",
    "begin": "<function=weather>",
    "content": {"type": "json_schema", "json_schema": CITY},
    "end": "</function>",
}
TIME = {
    "type": "tag",
    "begin": "<function=time>",
    "content": {"type": "regex", "pattern": "[0-9]{2}"},
    "end": "</function>",
}
THINK = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
CALLS = {"type": "triggered_tags", "triggers": ["<function="], "tags": [WEATHER, TIME]}
RAIN = '<function=weather>{"city": "Oslo"}</function>'
NOON = "<function=time>12</function>"


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def any_text(*excludes: str) -> dict[str, Any]:
    return {"type": "any_text", "excludes": list(excludes)}


FORMATS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "const_string": (text("a.b"), ["a.b"], ["", "axb", "a.b "]),
    "json_schema": (
        {"type": "json_schema", "json_schema": CITY, "style": "json"},
        ['{"city": "x"}'],
        ["{}", '{"city": 1}'],
    ),
    "regex": ({"type": "regex", "pattern": "a+|b"}, ["aa", "b"], ["", "ab"]),
    "gbnf": ({"type": "grammar", "grammar": 'root ::= "(" root ")" | "x"'}, ["((x))"], ["(x", ""]),
    "lark": ({"type": "grammar", "grammar": 'start: "a" start?'}, ["aaa"], ["", "b"]),
    "any_text": (any_text("no"), ["", "n o", "anything\n"], ["no", "a nono b"]),
    "any_text, bounded": ({"type": "any_text", "max_chars": 3}, ["", "añb"], ["four"]),
    "sequence": ({"type": "sequence", "elements": [text("a"), text("b")]}, ["ab"], ["a", "ba"]),
    "or": ({"type": "or", "elements": [text("a"), text("ab")]}, ["a", "ab"], ["b", "aab"]),
    "optional": ({"type": "optional", "content": text("a")}, ["", "a"], ["aa"]),
    "star": ({"type": "star", "content": text("ab")}, ["", "ab", "abab"], ["aba"]),
    "plus": ({"type": "plus", "content": text("ab")}, ["ab", "abab"], ["", "aba"]),
    "repeat": ({"type": "repeat", "min": 1, "max": 2, "content": text("a")}, ["a", "aa"], ["", "aaa"]),
    "repeat without bound": (
        {"type": "repeat", "min": 2, "max": -1, "content": text("a")},
        ["aa", "aaaaa"],
        ["a"],
    ),
    "tag": (WEATHER, [RAIN], [RAIN + " ", "<function=weather></function>"]),
    "tag with several ends": (
        {**TIME, "end": ["</function>", "!"]},
        ["<function=time>12!", NOON],
        ["<function=time>12"],
    ),
    "tag around free text": (
        THINK,
        ["<think></think>", "<think>a <think> b</thin</think>"],
        ["<think>a</think>b</think>", "<think>a", "a</think>"],
    ),
    "tag that may end without its end": (
        {**THINK, "end": ["</think>", ""]},
        ["<think>a", "<think>a</think>"],
        ["<think>a</think>b"],
    ),
    "end of a sequence closes the tag": (
        {**THINK, "content": {"type": "sequence", "elements": [text("1"), any_text("x")]}},
        ["<think>1</think>", "<think>1 2</think>"],
        ["<think>1 x</think>", "<think>2</think>", "<think>1</think></think>"],
    ),
    "either of two closes the tag": (
        {**THINK, "content": {"type": "or", "elements": [text("1"), any_text()]}},
        ["<think>1</think>", "<think>ab</think>"],
        ["<think>1</think></think>"],
    ),
    "triggered_tags": (
        CALLS,
        ["", "free <func text", RAIN, f"a {RAIN}{NOON} b <", f"<{NOON}"],
        ["<function=", "<function=time>1</function>", f"{NOON} <function=x>"],
    ),
    "triggered_tags, at least one": (
        {**CALLS, "at_least_one": True},
        [NOON, f"{NOON} and {RAIN} after"],
        ["", f"before {NOON}", "text"],
    ),
    "triggered_tags, only the first": (
        {**CALLS, "stop_after_first": True},
        ["", "text", f"before {NOON}"],
        [f"{NOON} after", NOON + NOON],
    ),
    "triggered_tags, exactly one": (
        {**CALLS, "at_least_one": True, "stop_after_first": True},
        [NOON, RAIN],
        ["", NOON + RAIN, f" {NOON}"],
    ),
    "triggered_tags with excludes": (
        {**CALLS, "excludes": ["<b>"]},
        ["<b", f"a{NOON}b"],
        ["<b>", f"<b>{NOON}", f"{NOON}<b>"],
    ),
    "triggered_tags inside a tag": (
        {**THINK, "content": CALLS},
        ["<think></think>", f"<think>a{NOON}b</think>"],
        [f"<think>{NOON}</think></think>", "<think><function=</think>", "<think>a"],
    ),
    "dispatch": (
        {"type": "dispatch", "rules": [["#", TIME], ["@", text("me")]], "loop": True},
        ["", "a", f"a#{NOON}b@me", "@me@me"],
        ["#", "@you", "a#a"],
    ),
    "dispatch once": (
        {"type": "dispatch", "rules": [["@", text("me")]], "loop": False},
        ["a", "a@me"],
        ["@meb", "@me@me"],
    ),
    "tags_with_separator": (
        {"type": "tags_with_separator", "tags": [TIME, WEATHER], "separator": ", "},
        ["", NOON, f"{NOON}, {RAIN}, {NOON}"],
        [f"{NOON},{RAIN}", f"{NOON}, ", "x"],
    ),
    "tags_with_separator, exactly one": (
        {
            "type": "tags_with_separator",
            "tags": [TIME],
            "separator": "",
            "at_least_one": True,
            "stop_after_first": True,
        },
        [NOON],
        ["", NOON + NOON],
    ),
    "reasoning, then JSON": (
        {"type": "sequence", "elements": [THINK, {"type": "json_schema", "json_schema": CITY}]},
        ['<think>{"city": 1}</think>{"city": "x"}'],
        ['{"city": "x"}', "<think>a</think>", '<think>a</think>{"city": 1}'],
    ),
    "reasoning, then tools": (
        {"type": "sequence", "elements": [THINK, CALLS]},
        [f"<think>{NOON[:12]}</think>so {NOON}", "<think></think>"],
        [NOON, "<think></think><function="],
    ),
    "the older form": (
        {
            "type": "structural_tag",
            "structures": [{"begin": "<function=weather>", "schema": CITY, "end": "</function>"}],
            "triggers": ["<function="],
        },
        ["", "text", f"a {RAIN} b"],
        ["<function=time>", "<function=weather>{}</function>"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str, tagged: Judge) -> None:
    value, members, others = FORMATS[name]
    accepts = tagged(value)
    assert {member: accepts(member) for member in members} == dict.fromkeys(members, True)
    assert {other: accepts(other) for other in others} == dict.fromkeys(others, False)


def reference(candidate: str, triggers: dict[str, str], end: str | None) -> bool:
    """Free text in which each trigger is followed by its content, until `end`: a scan from left to right."""
    start = 0
    for place in range(1, len(candidate) + 1):
        seen = candidate[start:place]
        if end is not None and seen.endswith(end):
            return place == len(candidate)
        for trigger, content in triggers.items():
            if seen.endswith(trigger):
                rest = candidate[place:]
                after = candidate[place + len(content) :]
                return rest.startswith(content) and reference(after, triggers, end)
    return end is None


@pytest.mark.parametrize(
    ("triggers", "end"),
    [
        ({"aa": "b"}, None),
        ({"ab": "a", "ba": "b"}, None),
        ({"aab": ""}, "bb"),
        ({"ba": "ab"}, "aa"),
        ({"aba": "b", "bb": "a"}, None),
        ({"b": "a"}, "aaa"),
    ],
)
def test_free_text_ends_where_a_marker_is_complete_first(
    triggers: dict[str, str], end: str | None, tagged: Judge
) -> None:
    rules = [[trigger, text(content)] for trigger, content in triggers.items()]
    format_: dict[str, Any] = {"type": "dispatch", "rules": rules}
    if end is not None:
        format_ = {"type": "tag", "begin": "", "content": format_, "end": end}
    accepts = tagged(format_)
    for length in range(9):
        for characters in itertools.product("ab", repeat=length):
            candidate = "".join(characters)
            assert accepts(candidate) == reference(candidate, triggers, end), candidate


REFUSED: list[tuple[Any, str, str]] = [
    ([], "an object is expected", "#"),
    ({"type": "json"}, '"structural_tag" is expected', "#/type"),
    ({"type": "structural_tag"}, "'format' is missing", "#"),
    (
        {"type": "structural_tag", "format": any_text(), "triggers": []},
        "'triggers' is not supported",
        "#/triggers",
    ),
    ({"type": "token", "token": 4}, "'token' is not supported", "#/format/type"),
    ({"type": "qwen_xml_parameter"}, "'qwen_xml_parameter' is not supported", "#/format/type"),
    ({"type": "any_text", "max_tokens": 4}, "a limit in tokens", "#/format/max_tokens"),
    ({"type": "any_text", "max_chars": -1}, "negative", "#/format/max_chars"),
    ({"type": "any_text", "exclude": ["a"]}, "'exclude' is not supported", "#/format/exclude"),
    ({"type": "any_text", "excludes": ["a", ""]}, "the string is empty", "#/format/excludes/1"),
    ({"type": "const_string"}, "'value' is missing", "#/format"),
    ({"type": "const_string", "value": 1}, "a string is expected", "#/format/value"),
    ({"type": "const_string", "value": "\ud800"}, "surrogate", "#/format/value"),
    ({"type": "sequence", "elements": []}, "at least one element", "#/format/elements"),
    ({"type": "or", "elements": [{"type": "or"}]}, "'elements' is missing", "#/format/elements/0"),
    ({"type": "star", "content": {"type": "x"}}, "'x' is not supported", "#/format/content/type"),
    ({"type": "repeat", "min": 2, "max": 1, "content": text("a")}, "`max` at least `min`", "#/format"),
    ({"type": "repeat", "min": True, "max": 1, "content": text("a")}, "an integer", "#/format/min"),
    ({"type": "regex", "pattern": "(a"}, "not closed", "#/format/pattern"),
    ({"type": "grammar", "grammar": "start: x"}, "line 1, column 8", "#/format/grammar"),
    (
        {"type": "json_schema", "json_schema": {"properties": {"a": {"type": "text"}}}},
        "text",
        "#/format/json_schema/properties/a/type",
    ),
    ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "'qwen_xml'", "#/format/style"),
    ({"type": "json_schema", "json_schema": {}, "any_order": True}, "any order", "#/format/any_order"),
    ({**THINK, "begin": {"type": "token", "token": 1}}, "a token in the place", "#/format/begin"),
    ({**THINK, "end": []}, "at least one end", "#/format/end"),
    ({**CALLS, "tags": []}, "at least one tag", "#/format/tags"),
    ({**CALLS, "triggers": ["<call"]}, "begins with no trigger", "#/format/tags/0/begin"),
    ({**CALLS, "triggers": ["<", "<f"]}, "more than one trigger", "#/format/tags/0/begin"),
    ({**CALLS, "triggers": ["<function=", "<x"]}, "no tag begins with the trigger '<x'", "#/format/triggers"),
    ({**CALLS, "at_least_one": 1}, "true or false", "#/format/at_least_one"),
    ({**THINK, "content": {**CALLS, "triggers": ["<"]}}, "can never be reached", "#/format/content"),
    ({"type": "dispatch", "rules": [["a"]]}, "a rule is a list", "#/format/rules/0"),
    ({"type": "dispatch", "rules": []}, "at least one rule", "#/format/rules"),
]


@pytest.mark.parametrize(("value", "message", "where"), REFUSED, ids=lambda part: str(part)[:40])
def test_refusals_say_what_and_where(value: Any, message: str, where: str) -> None:
    is_format = isinstance(value, dict) and value.get("type") not in ("structural_tag", "json")
    whole = {"type": "structural_tag", "format": value} if is_format else value
    with pytest.raises(ConstraintError) as caught:
        structural_tag_grammar(whole, Effort(), SchemaOptions())
    assert message in str(caught.value)
    assert caught.value.where == where


def test_equal_schemas_share_their_rules() -> None:
    tags = [{**WEATHER, "begin": f"<function={number}>"} for number in range(50)]
    one = structural_tag_grammar({"type": "structural_tag", "format": WEATHER}, Effort(), SchemaOptions())
    format_ = {**CALLS, "tags": tags}
    many = structural_tag_grammar({"type": "structural_tag", "format": format_}, Effort(), SchemaOptions())
    assert len(many.rules) < len(one.rules) + 2 * len(tags) + 10


@pytest.mark.parametrize("kind", ["star", "sequence", "tag"])
def test_deep_nesting_is_a_limit(kind: str) -> None:
    format_: dict[str, Any] = text("a")
    for _ in range(300):
        format_ = {
            "star": {"type": "star", "content": format_},
            "sequence": {"type": "sequence", "elements": [format_]},
            "tag": {"type": "tag", "begin": "<", "content": format_, "end": ">"},
        }[kind]
    json.dumps(format_)
    with pytest.raises(ConstraintTooComplex, match="nested deeper"):
        structural_tag_grammar({"type": "structural_tag", "format": format_}, Effort(), SchemaOptions())
