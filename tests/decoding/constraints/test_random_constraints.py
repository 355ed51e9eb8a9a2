"""Schemas and regular expressions that nobody chose: each is refused, or kept by a sampler that draws any token.

The truth is `jsonschema` and `re`. Compiled here rather than in a worker process, over a small vocabulary.
"""

import json
import random
import re
import warnings
from typing import Any

import jsonschema
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.spec import ConstraintSpec

from .sampling import SMALL, adversarial, budgets, constraint_of


def json_schemas() -> st.SearchStrategy[Any]:
    small = st.integers(0, 4)
    values = st.sampled_from([1, "a", "ab", None, [1], {"a": 1}])
    scalars = st.one_of(
        st.sampled_from([True, {}, {"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["integer", "number"])},
            optional={
                "minimum": st.integers(-30, 30),
                "maximum": st.integers(-5, 60),
                "exclusiveMinimum": st.integers(-9, 9),
                "multipleOf": st.sampled_from([1, 2, 5, 0.5]),
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("string")},
            optional={
                "minLength": small,
                "maxLength": small,
                "pattern": st.sampled_from(["^a+b?$", "x", "^[a-c]{2}", "[0-9]$", "^é|b$"]),
                "format": st.sampled_from(["date", "uuid", "ipv4", "unknown-format"]),
            },
        ),
        st.builds(lambda values: {"enum": values}, st.lists(values, min_size=1, max_size=4)),
    )

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.sampled_from(["a", "ab", "b", "x-1"])
        arrays = {
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": small,
            "maxItems": small,
            "uniqueItems": st.booleans(),
            "contains": inner,
        }
        objects = {
            "properties": st.dictionaries(names, inner, max_size=3),
            "required": st.lists(names, unique=True, max_size=2),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "minProperties": st.integers(0, 2),
            "maxProperties": small,
            "propertyNames": st.just({"maxLength": 2}),
        }
        several = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(
            st.fixed_dictionaries({"type": st.just("array")}, optional=arrays),
            st.fixed_dictionaries({"type": st.just("object")}, optional=objects),
            st.builds(
                lambda name, parts: {name: parts}, st.sampled_from(["anyOf", "allOf", "oneOf"]), several
            ),
            st.builds(lambda part: {"not": part}, inner),
            st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        )

    return st.recursive(scalars, larger, max_leaves=5)


def outcome(spec: ConstraintSpec) -> Constraint | None:
    """None where it is refused; anything else than a refusal is a failure of the test."""
    try:
        return constraint_of(spec, SMALL)
    except ConstraintError as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal
    return None


bounded = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@bounded
@given(json_schemas(), st.integers(0, 10**6))
@example({"type": "array", "uniqueItems": True, "minItems": 3, "items": {"enum": [1, 1.0, "a"]}}, 1)
@example({"not": {"type": ["object", "array", "string", "number", "boolean"]}}, 1)
def test_any_schema_is_refused_or_kept(schema: Any, seed: int) -> None:
    constraint = outcome(ConstraintSpec.json_schema(schema))
    if constraint is None:
        return
    kind = jsonschema.Draft202012Validator
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    for budget in budgets(constraint)[:4]:
        text = adversarial(constraint, budget, random.Random(seed + budget))
        assert validator.is_valid(json.loads(text)), text


def regexes() -> st.SearchStrategy[str]:
    """Well-formed ones, and texts that only look like them."""
    plain = ["a", "b", "ab", "1", "-", "é", "日", "."]
    classes = [r"\d", r"\w", r"\s", r"\S", r"\.", "[a-c]", "[^ab]", r"[\d-]", "(?i:x)"]
    atoms = st.sampled_from(plain + classes)

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        counts = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "{0}"])
        return st.one_of(
            st.builds(lambda part, count: f"(?:{part}){count}", inner, counts),
            st.builds(lambda one, other: f"({one}|{other})", inner, inner),
            st.builds(lambda one, other: one + other, inner, inner),
            st.builds(lambda part: f"^{part}$", inner),
            st.builds(lambda one, other: rf"{one}\b{other}", inner, inner),
            st.builds(lambda one, other: f"(?={one}){other}", inner, inner),
        )

    built = st.recursive(atoms, larger, max_leaves=6)
    return st.one_of(built, built, st.text(r"ab1(|)[]{}*+?^$\dwb,-", max_size=10))


@bounded
@given(regexes(), st.integers(0, 10**6))
@example("a{0}", 1)
@example("(a|ab)(c|bcd)*$", 1)
def test_any_regex_is_refused_or_kept(pattern: str, seed: int) -> None:
    constraint = outcome(ConstraintSpec.regex(pattern))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            expected = re.compile(pattern)
        except re.error:
            assert constraint is None, "what re cannot read"
            return
    if constraint is None:
        return
    for budget in budgets(constraint)[:4]:
        text = adversarial(constraint, budget, random.Random(seed + budget))
        assert expected.fullmatch(text), text
