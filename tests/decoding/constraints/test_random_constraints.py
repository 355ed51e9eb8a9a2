"""Schemas and regular expressions that nobody chose: each is refused, or kept by a sampler that draws any token.

The truth is `jsonschema` and `re`. Compiled here rather than in a worker process, over a small vocabulary.
"""

import json
import random
import re
import warnings
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.matcher import Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary


def a_small_vocabulary() -> TokenTables:
    """Bytes, pieces of JSON and of words, parts of characters, ids without text, and two tokens that end."""
    pieces = [
        '{"',
        '":',
        '",',
        '"}',
        "[]",
        "{}",
        '":"',
        "tr",
        "true",
        "null",
        "12",
        "0.",
        "-1",
        "e5",
        " ",
        "  ",
    ]
    pieces += ["ab", "abc", "aa", "ba", "a1", "x-", "\n", "\\u00", '\\"', "é", "日", "the ", "lower", "9]"]
    parts = ["é".encode()[:1], "🎵".encode()[:2], "🎵".encode()[2:] + b'"', b"\xff\xfe"]
    tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in pieces] + parts
    tokens += [b"", b"", b"", b"ab"]
    vocabulary = Vocabulary(tokens, [len(tokens) - 4, len(tokens) - 2])
    return TokenTables(vocabulary, vocabulary.segment)


SMALL = a_small_vocabulary()


def constraint_of(spec: ConstraintSpec, tables: TokenTables) -> Constraint:
    compiled = compile_spec(spec, tables.vocabulary, Effort(Limits(max_seconds=5.0)))
    return Constraint(spec, compiled, tables, 0)


def allowed(matcher: Matcher, vocabulary: Vocabulary, remaining: int) -> list[int]:
    row = np.full(vocabulary.num_words, -1, np.int32)
    matcher.fill(row, remaining)
    found = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    ends = set(vocabulary.eos_ids)
    assert ends <= set(found) if matcher.is_complete else not ends & set(found)
    assert all(vocabulary.tokens[token_id] for token_id in set(found) - ends), "ids without text"
    assert found, "there is always a way to go on"
    return [int(token_id) for token_id in found]


def adversarial(constraint: Constraint, budget: int, rng: random.Random) -> str:
    """What a sampler writes that knows nothing of the constraint and likes no token better than another."""
    vocabulary, matcher = constraint.tables.vocabulary, constraint.matcher()
    tokens: list[int] = []
    while len(tokens) < budget and not (tokens and matcher.is_ended):
        candidates = allowed(matcher, vocabulary, budget - len(tokens))
        text_only = [token_id for token_id in candidates if token_id not in vocabulary.eos_ids]
        drawn = rng.choice(text_only if text_only and rng.random() < 0.9 else candidates)
        chosen = matcher.accept(drawn, budget - len(tokens))
        assert chosen in candidates
        assert chosen == drawn or matcher.limited
        if chosen in vocabulary.eos_ids:
            break
        tokens.append(chosen)
        tokens += matcher.forced(budget - len(tokens))
    assert matcher.is_complete
    assert len(tokens) <= budget
    return b"".join(vocabulary.tokens[token_id] for token_id in tokens).decode()


def budgets(constraint: Constraint) -> list[int]:
    least = max(constraint.min_tokens, 1)
    return [least, least + 1, least + 3, least + 15, least + 40]


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
