"""Generated schemas, both ways: what the grammar derives is valid, and what is valid the grammar derives.

The other side is always the `jsonschema` package. Values avoid what the grammar writes otherwise on purpose: integers
with a point, and line breaks where Python's `$` means something else than ECMAScript's.
"""

import json
import random
from itertools import permutations, product
from typing import Any

import jsonschema
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.parser import Parser

NAMES = ["a", "b", "ab", "c1"]
PATTERNS = ["^a", "b$", "^a*$", "[0-9]", "^(a|ab)$", "^.?$", "^[^a]", "a"]
SCALARS = [
    None, True, False, 0, 1, 2, 3, -1, 5, 0.5, 2.5, -1.5, 1e-7, "", "a", "b", "ab", "aab", 'x"y', "\t", "\\", "é",
]  # fmt: skip

scalars = st.sampled_from(SCALARS)
names = st.sampled_from(NAMES)
bounds = st.sampled_from([-1, 0, 1, 2, 3, 0.5, 2.5, -1.5])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "z", '"q']), inner, max_size=3)
    ),
    max_leaves=5,
)
types = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])
leaves = (
    st.booleans()
    | st.fixed_dictionaries({"type": types})
    | st.fixed_dictionaries({"const": scalars})
    | st.fixed_dictionaries({"enum": st.lists(values, min_size=1, max_size=3)})
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "number"])},
        optional={
            "minLength": st.integers(0, 3), "maxLength": st.integers(0, 4), "pattern": st.sampled_from(PATTERNS),
            "minimum": bounds, "maximum": bounds, "exclusiveMinimum": bounds, "exclusiveMaximum": bounds,
            "multipleOf": st.sampled_from([1, 2, 3, 0.5, 0.25]),
        },
    )
)  # fmt: skip


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("array"), "items": inner, "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2), "maxItems": st.integers(0, 3),
            "unevaluatedItems": inner,
        },
    )  # fmt: skip
    containing = st.fixed_dictionaries(
        {"contains": inner}, optional={"minContains": st.integers(0, 2), "maxContains": st.integers(0, 2)}
    )
    unique = st.fixed_dictionaries(
        {
            "type": st.just("array"),
            "items": st.fixed_dictionaries({"enum": st.lists(scalars, max_size=4)}),
            "uniqueItems": st.just(True),
        }
    )
    objects = st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3),
            "required": st.lists(names, unique=True, max_size=2), "additionalProperties": inner,
            "maxProperties": st.integers(0, 3), "minProperties": st.integers(0, 1),
        },
    )  # fmt: skip
    keyed = st.fixed_dictionaries(
        {},
        optional={
            "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), inner, max_size=2),
            "propertyNames": st.sampled_from([{"pattern": "^a"}, {"maxLength": 1}, {"enum": ["a", "z"]}]),
            "dependentRequired": st.dictionaries(names, st.lists(names, max_size=1), max_size=1),
            "dependentSchemas": st.dictionaries(names, inner, max_size=1),
            "unevaluatedProperties": inner,
        },
    )
    several = st.lists(inner, min_size=1, max_size=3)
    logic = st.one_of(
        *(st.fixed_dictionaries({keyword: several}) for keyword in ("allOf", "anyOf", "oneOf")),
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"if": inner}, optional={"then": inner, "else": inner}),
    )
    kinds = st.one_of(arrays, containing, unique, objects, keyed, logic)
    return st.builds(lambda one, two: {**one, **two}, kinds, st.one_of(kinds, st.just({})))


schemas = st.recursive(leaves, _larger, max_leaves=6).filter(lambda schema: isinstance(schema, dict))
bounded = settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def _compiled_or_skip(schema: Any, compiled: Any, candidates: list[Any]) -> Any:
    try:
        return compiled(schema)
    except ConstraintError as error:
        if "no value satisfies" in str(error):
            validator = jsonschema.Draft202012Validator(schema)
            assert not [value for value in candidates if validator.is_valid(value)]
        assume(False)


@bounded
@given(schema=schemas, some_values=st.lists(values, min_size=8, max_size=16))
def test_values_are_derived_exactly_if_they_are_valid(schema, some_values, compiled, accepts_text):
    grammar = _compiled_or_skip(schema, compiled, some_values)
    validator = jsonschema.Draft202012Validator(schema)
    for value in some_values:
        accepted = any(accepts_text(grammar, text) for text in orders(value))
        assert accepted == validator.is_valid(value), value


def orders(value: Any) -> list[str]:
    """The texts of a value, with the members of its objects in every order."""
    if isinstance(value, list):
        return ["[" + ", ".join(items) + "]" for items in product(*map(orders, value))]
    if not isinstance(value, dict):
        return [json.dumps(value, ensure_ascii=False)]
    texts = []
    for members in permutations(value.items()):
        keys = [json.dumps(name, ensure_ascii=False) for name, _ in members]
        for items in product(*(orders(item) for _, item in members)):
            texts.append("{" + ", ".join(f"{k}: {i}" for k, i in zip(keys, items, strict=True)) + "}")
    return texts


@bounded
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_random_texts_of_the_grammar_are_valid(schema, seed, compiled):
    grammar = _compiled_or_skip(schema, compiled, SCALARS)
    validator = jsonschema.Draft202012Validator(schema)
    for length in (0, 3, 12, 40):
        text = random_text(Parser(grammar), length, random.Random(seed + length))
        assert validator.is_valid(json.loads(text)), text


def random_text(parser: Parser, length: int, choose: random.Random) -> str:
    """Bytes at random, now and then a few that lead to the end, and after `length` steps the shortest completion."""
    text = bytearray()
    for _ in range(length):
        if choose.random() < 0.35:
            some = parser.completion()[: choose.randint(1, 4)]
        else:
            following = parser.next_bytes()
            some = bytes([choose.choice(following)]) if following else b""
        assert parser.advance(some)
        text += some
    rest = parser.completion()
    assert parser.advance(rest)
    assert parser.is_complete
    return (text + rest).decode()
