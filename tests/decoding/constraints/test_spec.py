"""Specifications: what Python callers may give, what is equal to what, and what cannot go with a constraint."""

import dataclasses
import datetime
import enum
import json
import pickle
import re
import subprocess
import sys
from typing import Annotated, Any, Literal, NewType, Optional

import outlines.types as outlines
import pydantic
import pytest
from outlines.types.dsl import String, to_regex
from typing_extensions import TypedDict

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.spec import ConstraintSpec, check_combination, constraint_spec
from cadenza.decoding.request import RequestError, SamplingParams


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


class User(pydantic.BaseModel):
    name: str
    friends: "list[User]" = []


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Movie(TypedDict):
    title: str


def area(width: int, height: int = 1) -> int:
    return width * height


UserId = NewType("UserId", int)


def schema(value: Any) -> ConstraintSpec:
    return ConstraintSpec.json_schema(pydantic.TypeAdapter(value).json_schema(), additional_properties=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # JSON Schema
        ({"type": "null"}, ConstraintSpec.json_schema({"type": "null"})),
        (User, schema(User)),
        (Point, schema(Point)),
        (Movie, schema(Movie)),
        (list[int], schema(list[int])),
        (list[User], schema(list[User])),
        (dict[str, int], schema(dict[str, int])),
        (tuple[int, str], schema(tuple[int, str])),
        (User | None, schema(User | None)),
        (list[int] | str, schema(list[int] | str)),
        (Optional[Point], schema(Point | None)),  # noqa: UP045 - a class of its own until Python 3.14
        (Annotated[int, pydantic.Field(ge=3)], schema(Annotated[int, pydantic.Field(ge=3)])),
        (dict, ConstraintSpec.json_object()),
        (Any, schema(Any)),
        (outlines.JsonSchema({"type": "null"}), ConstraintSpec.json_schema({"type": "null"})),
        (
            outlines.JsonSchema(User, whitespace_pattern=" ?"),
            ConstraintSpec.json_schema(User.model_json_schema(), whitespace_pattern=" ?"),
        ),
        # choices
        (Literal["a", "b"], ConstraintSpec.choice(["a", "b"])),
        (Literal[1, True, None], ConstraintSpec.choice(["1", "True", "None"])),
        (Literal["a", Colour.RED], ConstraintSpec.choice(["a", "red"])),
        (Literal["a"] | None, ConstraintSpec.choice(["a", "None"])),
        (Literal["a"] | Colour, ConstraintSpec.choice(["a", "red", "blue"])),
        (Colour, ConstraintSpec.choice(["red", "blue"])),
        (Number, ConstraintSpec.choice(["1", "2"])),
        (outlines.Choice(["a", 1]), ConstraintSpec.choice(["a", "1"])),
        (outlines.either("a", "b"), ConstraintSpec.choice(["a", "b"])),
        (String("a"), ConstraintSpec.choice(["a"])),
        # regular expressions
        (re.compile("a|b"), ConstraintSpec.regex("a|b")),
        (re.compile("a", re.IGNORECASE | re.DOTALL), ConstraintSpec.regex("(?is)a")),
        (re.compile("(?i)a", re.VERBOSE), ConstraintSpec.regex("(?ix)a")),
        (int, ConstraintSpec.regex(outlines.integer.pattern)),
        (UserId, ConstraintSpec.regex(outlines.integer.pattern)),
        (bool, ConstraintSpec.regex(outlines.boolean.pattern)),
        (datetime.date, ConstraintSpec.regex(outlines.date.pattern)),
        (int | None, ConstraintSpec.regex(f"(({outlines.integer.pattern})|(None))")),
        (outlines.email, ConstraintSpec.regex(outlines.email.pattern)),
        # grammars
        (outlines.CFG('start: "a"'), ConstraintSpec.grammar('start: "a"')),
        # what is one already
        (ConstraintSpec.choice(["a"]), ConstraintSpec.choice(["a"])),
    ],
)
def test_python_values(value: Any, expected: ConstraintSpec) -> None:
    assert constraint_spec(value) == expected


def test_a_functions_arguments() -> None:
    spec = constraint_spec(area)
    properties = json.loads(spec.source)["properties"]
    assert spec.kind == "json_schema"
    assert {name: member["type"] for name, member in properties.items()} == {
        "width": "integer",
        "height": "integer",
    }


@pytest.mark.parametrize(
    ("term", "texts", "others"),
    [
        ("#" + outlines.integer, ["#0", "#-12"], ["#", "#01", "12"]),
        (outlines.either("none", outlines.integer.between(1, 2)), ["none", "7", "1234"], ["nine", ""]),
        (outlines.optional("a") + outlines.either("b", ""), ["", "a", "ab", "b"], ["ba", "aa"]),
        (outlines.Choice(["a.c", outlines.integer]), ["a.c", "5"], ["abc"]),
        (int | None | bool, ["5", "None", "True"], ["none", "5.0"]),
    ],
)
def test_terms_mean_what_outlines_means(term: Any, texts: list[str], others: list[str]) -> None:
    spec = constraint_spec(term)
    assert spec.kind == "regex"
    assert all(re.fullmatch(spec.source, text) for text in texts)
    assert not any(re.fullmatch(spec.source, text) for text in others)


def test_flags_of_a_pattern_are_kept() -> None:
    for pattern in (re.compile("a b", re.X), re.compile("A.b", re.I | re.S), re.compile("(?si)^a.b$", re.M)):
        again = re.compile(constraint_spec(pattern).source)
        assert again.flags == pattern.flags
        texts = ["ab", "a b", "a\nb", "AxB", "A\nB", "x\nab"]
        assert [bool(again.fullmatch(text)) for text in texts] == [
            bool(pattern.fullmatch(text)) for text in texts
        ]


@pytest.mark.parametrize(
    "value",
    [
        "a text",
        5,
        None,
        True,
        [User],
        object(),
        print,
        lambda x: x,
        re.compile(b"a"),
        Literal[b"a"],
        enum.Enum("Empty", []),
        outlines.Choice([]),
        outlines.Choice(["a", User]),
        outlines.either(outlines.JsonSchema({"type": "null"}), "none"),
        outlines.one_or_more(outlines.CFG('start: "a"')),
        type("Opaque", (), {}),
        {"const": float("nan")},
        {"const": {1, 2}},
    ],
)
def test_what_is_no_constraint(value: Any) -> None:
    with pytest.raises(ConstraintError) as caught:
        constraint_spec(value)
    assert "\n" not in str(caught.value)


def test_deep_values_are_too_complex() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    term = outlines.integer
    for _ in range(3_000):
        term = outlines.optional(term)
    for make in (
        lambda: constraint_spec(deep),
        lambda: ConstraintSpec.json_schema("[" * 100_000),
        lambda: constraint_spec(term),
    ):
        with pytest.raises(ConstraintTooComplex):
            make()


def test_texts_that_are_not_json() -> None:
    for text in ("", "{", "nul", '{"a": 1,}'):
        with pytest.raises(ConstraintError, match="not valid JSON"):
            ConstraintSpec.json_schema(text)


def test_equality_is_that_of_the_language() -> None:
    text = '{"b": 1,\n "a": "ä"}'
    spec = ConstraintSpec.json_schema({"b": 1, "a": "ä"})
    assert spec == ConstraintSpec.json_schema(text, name="unused", param="guided_json")
    assert hash(spec) == hash(ConstraintSpec.json_schema(text, param="guided_json"))
    assert spec.source == '{"b":1,"a":"ä"}'
    others = [
        ConstraintSpec.json_schema({"a": "ä", "b": 1}),
        ConstraintSpec.json_schema(text, strict=True),
        ConstraintSpec.json_schema(text, any_whitespace=False),
        ConstraintSpec.json_schema(text, whitespace_pattern=""),
        ConstraintSpec.json_schema(text, additional_properties=False),
        ConstraintSpec.structural_tag(text),
        ConstraintSpec.regex(spec.source),
    ]
    assert len({spec, *others}) == len(others) + 1
    assert pickle.loads(pickle.dumps(others)) == others


def test_importing_and_using_it_is_light() -> None:
    """The process that compiles starts with it: no torch, no outlines, no server."""
    code = (
        "import sys, re; from cadenza.decoding.constraints.spec import ConstraintSpec, constraint_spec\n"
        "constraint_spec({}); constraint_spec(re.compile('a')); ConstraintSpec.choice(['a'])\n"
        "heavy = {'torch', 'transformers', 'outlines', 'pydantic', 'fastapi'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "from typing import Literal; constraint_spec(Literal['a', 'b']); constraint_spec(list[int])\n"
        "heavy = {'torch', 'transformers', 'outlines', 'fastapi'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outlines_writes_terms_as_we_expect() -> None:
    """The regexes above lean on outlines: this fails when a release of it means something else."""
    assert to_regex(String("a.b")) == r"a\.b"
    assert (outlines.integer.pattern, outlines.boolean.pattern) == (r"[+-]?(0|[1-9][0-9]*)", "(True|False)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", ("END",)),
        ("stop_token_ids", (5,)),
        ("stop_token_ids", (2, 5)),
        ("ignore_eos", True),
        ("min_tokens", 1),
        ("bad_words", ("darn",)),
        ("allowed_token_ids", (1, 2)),
    ],
)
def test_what_could_cut_or_prolong_an_answer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} cannot be combined with a constraint") as caught:
        check_combination(SamplingParams(**{name: value}), eos_token_ids=(2,))
    assert caught.value.param == name


ALLOWED: dict[str, Any] = {
    "n": 3,
    "max_tokens": 0,
    "min_tokens": 0,
    "temperature": 0.5,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.5,
    "typical_p": 0.5,
    "top_n_sigma": 1.0,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "xtc_probability": 1.0,
    "xtc_threshold": 0.05,
    "mirostat": 2,
    "mirostat_tau": 0.1,
    "mirostat_eta": 1.0,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 2.0,
    "dry_multiplier": 5.0,
    "dry_base": 3.0,
    "dry_allowed_length": 1,
    "dry_sequence_breakers": (),
    "dry_penalty_last_n": 64,
    "repetition_penalty": 1.5,
    "presence_penalty": 1.0,
    "frequency_penalty": -1.0,
    "logit_bias": {5: -100.0},
    "stop_token_ids": (2,),
    "include_stop_str_in_output": True,
    "seed": 5,
    "logprobs": 1,
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_leaves_a_way_to_the_end_is_allowed(name: str) -> None:
    check_combination(SamplingParams(**{name: ALLOWED[name]}), eos_token_ids=(2,))


def test_every_parameter_is_decided() -> None:
    """A parameter that comes later must say whether a constraint bears it."""
    refused = {"stop", "ignore_eos", "bad_words", "allowed_token_ids"}
    assert refused | ALLOWED.keys() == set(SamplingParams.__dataclass_fields__)
