"""Each way of asking for a constraint means one specification; whatever is unclear is refused by the field's name."""

import json
from typing import Any

import pytest

from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.request import RequestError
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.wire import parse

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": None}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":null}}}'
LARK = 'start: "a" start?'
GBNF = 'root ::= "a" root?'
LEGACY_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": {"type": "object", "x": None}, "end": "</f>"}],
    "triggers": ["<f"],
}
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return parse(ChatRequest, json.dumps({"messages": messages, **fields}).encode())


def named(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **fields}}


WAYS: dict[str, tuple[dict[str, Any], ConstraintSpec, str]] = {
    "json_object": (
        {"response_format": {"type": "json_object"}},
        ConstraintSpec.json_object(),
        "response_format",
    ),
    "json_schema": (
        {"response_format": named()},
        ConstraintSpec.json_schema(SCHEMA),
        "response_format.json_schema.schema",
    ),
    "strict json_schema": (
        {"response_format": named(strict=True, description="what for")},
        ConstraintSpec.json_schema(SCHEMA, strict=True, name="n"),
        "response_format.json_schema.schema",
    ),
    "boolean json_schema": (
        {"response_format": named(schema=True)},
        ConstraintSpec.json_schema(True),
        "response_format.json_schema.schema",
    ),
    "grammar in response_format": (
        {"response_format": {"type": "grammar", "grammar": LARK}},
        ConstraintSpec.grammar(LARK),
        "response_format.grammar",
    ),
    "legacy structural_tag": (
        {"response_format": LEGACY_TAG},
        ConstraintSpec.structural_tag(LEGACY_TAG),
        "response_format",
    ),
    "structural_tag": (
        {"response_format": TAG},
        ConstraintSpec.structural_tag(TAG),
        "response_format",
    ),
    "vLLM json": (
        {"structured_outputs": {"json": SCHEMA}},
        ConstraintSpec.json_schema(SCHEMA),
        "structured_outputs.json",
    ),
    "vLLM json as text": (
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        ConstraintSpec.json_schema(SCHEMA),
        "structured_outputs.json",
    ),
    "vLLM regex": (
        {"structured_outputs": {"regex": "a+"}},
        ConstraintSpec.regex("a+"),
        "structured_outputs.regex",
    ),
    "vLLM choice": (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        ConstraintSpec.choice(["yes", "no"]),
        "structured_outputs.choice",
    ),
    "vLLM grammar": (
        {"structured_outputs": {"grammar": GBNF}},
        ConstraintSpec.grammar(GBNF),
        "structured_outputs.grammar",
    ),
    "vLLM json_object": (
        {"structured_outputs": {"json_object": True}},
        ConstraintSpec.json_object(),
        "structured_outputs.json_object",
    ),
    "vLLM structural_tag": (
        {"structured_outputs": {"structural_tag": TAG}},
        ConstraintSpec.structural_tag(TAG),
        "structured_outputs.structural_tag",
    ),
    "vLLM structural_tag as text": (
        {"structured_outputs": {"structural_tag": json.dumps(LEGACY_TAG)}},
        ConstraintSpec.structural_tag(LEGACY_TAG),
        "structured_outputs.structural_tag",
    ),
    "guided_json": ({"guided_json": SCHEMA}, ConstraintSpec.json_schema(SCHEMA), "guided_json"),
    "guided_json as text": (
        {"guided_json": json.dumps(SCHEMA)},
        ConstraintSpec.json_schema(SCHEMA),
        "guided_json",
    ),
    "guided_regex": ({"guided_regex": "[0-9]+"}, ConstraintSpec.regex("[0-9]+"), "guided_regex"),
    "guided_choice": ({"guided_choice": ["b", "a"]}, ConstraintSpec.choice(["b", "a"]), "guided_choice"),
    "guided_grammar": ({"guided_grammar": LARK}, ConstraintSpec.grammar(LARK), "guided_grammar"),
    "llama.cpp json_schema": ({"json_schema": {}}, ConstraintSpec.json_schema({}), "json_schema"),
    "SGLang json_schema": (
        {"json_schema": json.dumps(SCHEMA)},
        ConstraintSpec.json_schema(SCHEMA),
        "json_schema",
    ),
    "llama.cpp grammar": ({"grammar": GBNF}, ConstraintSpec.grammar(GBNF), "grammar"),
    "SGLang regex": ({"regex": "x|y"}, ConstraintSpec.regex("x|y"), "regex"),
    "SGLang ebnf": ({"ebnf": GBNF}, ConstraintSpec.grammar(GBNF), "ebnf"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking(way: str) -> None:
    fields, expected, param = WAYS[way]
    for body in (completion(**fields), chat(**fields)):
        assert body.constraint_spec == expected
        assert body.constraint_spec is not None
        assert body.constraint_spec.param == param


ORDER = [
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
]
ORDER += ["json_schema", "grammar", "regex", "ebnf"]


def _field(way: str) -> str:
    return WAYS[way][2].partition(".")[0]


PAIRS = [
    (first, second)
    for first in ("json_schema", "vLLM regex", "guided_json", "llama.cpp grammar")
    for second in WAYS
    if ORDER.index(_field(first)) < ORDER.index(_field(second))
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_constraints_are_refused_by_the_second(first: str, second: str) -> None:
    for fields in (WAYS[first][0] | WAYS[second][0], WAYS[second][0] | WAYS[first][0]):
        with pytest.raises(RequestError, match=f"excludes {WAYS[first][2]}: .* at most one") as caught:
            completion(**fields)
        assert caught.value.param == WAYS[second][2]


def test_two_constraints_within_structured_outputs() -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json") as caught:
        completion(structured_outputs={"regex": "a", "json": {}})
    assert caught.value.param == "structured_outputs.regex"


NO_CONSTRAINT: list[dict[str, Any]] = [
    {},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "text", "json_schema": None}},
    {"response_format": None},
    {"grammar": ""},
    {"grammar": None, "json_schema": None, "structured_outputs": None, "guided_json": None},
    {"guided_decoding_backend": "outlines"},
]


@pytest.mark.parametrize("fields", NO_CONSTRAINT)
def test_no_constraint(fields: dict[str, Any]) -> None:
    assert completion(**fields).constraint_spec is None


def test_no_constraint_beside_one() -> None:
    """llama.cpp's clients send all their fields, the unused ones empty."""
    body = completion(grammar="", json_schema={"type": "null"}, response_format={"type": "text"})
    assert body.constraint_spec == ConstraintSpec.json_schema({"type": "null"})


def test_members_keep_their_order_and_their_nulls() -> None:
    spec = completion(guided_json=SCHEMA).constraint_spec
    assert spec is not None
    assert spec.source == SCHEMA_TEXT
    swapped = completion(guided_json=dict(reversed(SCHEMA.items()))).constraint_spec
    assert swapped != spec


def test_equal_constraints_are_compiled_once() -> None:
    """Whoever asks, however it is spelled: what is kept is found by the specification."""
    ways: list[dict[str, Any]] = [
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": json.dumps(SCHEMA, indent=2)}},
        {"response_format": named()},
        {"response_format": named(name="other")},
    ]
    assert len({completion(**way).constraint_spec for way in ways}) == 1


JSON_KINDS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "json_object": {"json_object": True},
    "structural_tag": {"structural_tag": LEGACY_TAG},
}


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_whitespace(kind: str) -> None:
    asked = JSON_KINDS[kind]
    default = completion(structured_outputs=asked).constraint_spec
    assert default is not None
    assert (default.whitespace_pattern, default.any_whitespace) == (None, True)
    own = completion(structured_outputs={**asked, "whitespace_pattern": "[ ]?"}).constraint_spec
    assert own is not None
    assert (own.whitespace_pattern, own.any_whitespace) == ("[ ]?", True)
    none = completion(structured_outputs={**asked, "disable_any_whitespace": True}).constraint_spec
    assert none is not None
    assert (none.whitespace_pattern, none.any_whitespace) == (None, False)
    same = completion(structured_outputs={**asked, "disable_any_whitespace": False}).constraint_spec
    assert same == default
    assert len({default, own, none}) == 3


def test_guided_whitespace_pattern() -> None:
    spec = completion(guided_json=SCHEMA, guided_whitespace_pattern="").constraint_spec
    assert spec == ConstraintSpec.json_schema(SCHEMA, whitespace_pattern="")


@pytest.mark.parametrize("kind", ["json", "structural_tag"])
def test_additional_properties(kind: str) -> None:
    options = {**JSON_KINDS[kind], "disable_additional_properties": True}
    spec = completion(structured_outputs=options).constraint_spec
    assert spec is not None
    assert spec.additional_properties is False
    options["disable_additional_properties"] = False
    spec = completion(structured_outputs=options).constraint_spec
    assert spec is not None
    assert spec.additional_properties is None


OUT, FORMAT = "structured_outputs", "response_format"

MISTAKES: list[tuple[dict[str, Any], str]] = [
    # options with nothing to apply to, or against each other
    ({OUT: {"regex": "a", "whitespace_pattern": " "}}, f"{OUT}.whitespace_pattern"),
    ({OUT: {"choice": ["a"], "disable_any_whitespace": True}}, f"{OUT}.disable_any_whitespace"),
    (
        {OUT: {"grammar": LARK, "disable_additional_properties": True}},
        f"{OUT}.disable_additional_properties",
    ),
    (
        {OUT: {"json_object": True, "disable_additional_properties": True}},
        f"{OUT}.disable_additional_properties",
    ),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    (
        {OUT: {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
        f"{OUT}.disable_any_whitespace",
    ),
    (
        {OUT: {"json": {}, "whitespace_pattern": " "}, "guided_whitespace_pattern": " "},
        f"{OUT}.whitespace_pattern",
    ),
    ({OUT: {"json": {}, "disable_any_whitespace": "yes"}}, f"{OUT}.disable_any_whitespace"),
    # none at all
    ({OUT: {}}, OUT),
    ({OUT: {"json_object": False}}, OUT),
    ({OUT: {"whitespace_pattern": " "}}, OUT),
    # response_format
    ({FORMAT: "json_object"}, FORMAT),
    ({FORMAT: {}}, f"{FORMAT}.type"),
    ({FORMAT: {"type": "yaml"}}, f"{FORMAT}.type"),
    ({FORMAT: {"type": "text", "schema": {}}}, f"{FORMAT}.schema"),
    ({FORMAT: {"type": "text", "grammar": LARK}}, f"{FORMAT}.grammar"),
    ({FORMAT: {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}}, f"{FORMAT}.json_schema"),
    ({FORMAT: {"type": "json_schema"}}, f"{FORMAT}.json_schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"name": "n"}}}, f"{FORMAT}.json_schema.schema"),
    ({FORMAT: named(schema=None)}, f"{FORMAT}.json_schema.schema"),
    ({FORMAT: named(schema="{}")}, f"{FORMAT}.json_schema.schema"),
    ({FORMAT: named(schema=[])}, f"{FORMAT}.json_schema.schema"),
    ({FORMAT: named(name=None)}, f"{FORMAT}.json_schema.name"),
    ({FORMAT: named(name="")}, f"{FORMAT}.json_schema.name"),
    ({FORMAT: named(name="two words")}, f"{FORMAT}.json_schema.name"),
    ({FORMAT: named(name="line\n")}, f"{FORMAT}.json_schema.name"),
    ({FORMAT: named(name="n" * 65)}, f"{FORMAT}.json_schema.name"),
    ({FORMAT: named(strict="yes")}, f"{FORMAT}.json_schema.strict"),
    ({FORMAT: named(description=1)}, f"{FORMAT}.json_schema.description"),
    ({FORMAT: named(title="x")}, f"{FORMAT}.json_schema.title"),
    ({FORMAT: {**named(), "strict": True}}, f"{FORMAT}.strict"),
    ({FORMAT: {"type": "grammar"}}, f"{FORMAT}.grammar"),
    ({FORMAT: {"type": "grammar", "grammar": ""}}, f"{FORMAT}.grammar"),
    ({FORMAT: {"type": "grammar", "grammar": {}}}, f"{FORMAT}.grammar"),
    ({FORMAT: {"type": "structural_tag"}}, f"{FORMAT}.format"),
    ({FORMAT: {"type": "structural_tag", "structures": []}}, f"{FORMAT}.triggers"),
    ({FORMAT: {"type": "structural_tag", "triggers": []}}, f"{FORMAT}.structures"),
    ({FORMAT: {**LEGACY_TAG, **TAG}}, f"{FORMAT}.structures"),
    # structured_outputs and the aliases
    ({OUT: []}, OUT),
    ({OUT: {"jsn": {}}}, f"{OUT}.jsn"),
    ({OUT: {"json_": {}}}, f"{OUT}.json_"),
    ({OUT: {"json": []}}, f"{OUT}.json"),
    ({OUT: {"json": "{"}}, f"{OUT}.json"),
    ({OUT: {"json": "3"}}, f"{OUT}.json"),
    ({OUT: {"json": "[" * 5000}}, f"{OUT}.json"),
    ({OUT: {"json": '{"const": NaN}'}}, f"{OUT}.json"),
    ({OUT: {"regex": ""}}, f"{OUT}.regex"),
    ({OUT: {"regex": ["a"]}}, f"{OUT}.regex"),
    ({OUT: {"choice": []}}, f"{OUT}.choice"),
    ({OUT: {"choice": "yes"}}, f"{OUT}.choice"),
    ({OUT: {"choice": ["yes", 1]}}, f"{OUT}.choice[1]"),
    ({OUT: {"choice": ["yes", ""]}}, f"{OUT}.choice[1]"),
    ({OUT: {"grammar": ""}}, f"{OUT}.grammar"),
    ({OUT: {"json_object": "true"}}, f"{OUT}.json_object"),
    ({OUT: {"structural_tag": "{"}}, f"{OUT}.structural_tag"),
    ({OUT: {"structural_tag": []}}, f"{OUT}.structural_tag"),
    ({"guided_json": 3}, "guided_json"),
    ({"guided_json": "no"}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": {"a": 1}}, "guided_choice"),
    ({"guided_grammar": []}, "guided_grammar"),
    ({"json_schema": [1]}, "json_schema"),
    ({"grammar": {}}, "grammar"),
    ({"regex": 5}, "regex"),
    ({"ebnf": LARK}, "ebnf"),
]


@pytest.mark.parametrize(("fields", "param"), MISTAKES)
def test_mistakes_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(("Unrecognized", param))
    assert "\n" not in str(caught.value)


def test_a_number_that_cannot_be_written_again() -> None:
    """It reads as infinity, which JSON does not have."""
    with pytest.raises(RequestError) as caught:
        parse(CompletionRequest, b'{"prompt": "x", "guided_json": {"const": 1e999}}')
    assert caught.value.param == "guided_json"


@pytest.mark.parametrize("depth", [50, 150, 195, 250, 5000])
def test_deep_constraints_are_read_or_refused(depth: int) -> None:
    deep = '{"not":' * depth + "{}" + "}" * depth
    for field in (
        f'"guided_json": {deep}',
        f'"structured_outputs": {{"json": {json.dumps(deep)}}}',
        f'"response_format": {{"type": "structural_tag", "format": {deep}}}',
    ):
        try:
            body = parse(CompletionRequest, f'{{"prompt": "x", {field}}}'.encode())
        except RequestError:
            assert depth > 190
        else:
            assert body.constraint_spec is not None
            assert deep in body.constraint_spec.source


def test_the_answer_is_a_400_in_the_clients_shape(client: Any) -> None:
    body = {"prompt": "x", "response_format": {"type": "json_schema"}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format.json_schema"
