"""Numerals against the arithmetic of a validator, at the ends of ranges and where doubles round."""

import json
import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jsonschema
import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import numerals
from cadenza.decoding.constraints.schema.number_part import Bound

SCHEMAS: list[dict[str, Any]] = [
    {"type": "number"},
    {"type": "integer"},
    {"type": "number", "minimum": 0.1, "maximum": 0.3},
    {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.3},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 1000},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "maximum": -1e-5},
    {"type": "number", "minimum": 12345678901234567},
    {"type": "number", "not": {"minimum": 0.3}},
    {"type": "number", "not": {"const": 0.1}},
    {"type": "number", "not": {"type": "integer"}},
    {"type": "integer", "minimum": -105, "maximum": 99},
    {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 1234567},
    {"type": "integer", "maximum": 1e308},
    {"type": "integer", "multipleOf": 7, "minimum": -50},
    {"type": "integer", "multipleOf": 360},
    {"type": "integer", "multipleOf": 7, "not": {"const": 14}},
    {"type": "number", "multipleOf": 2.5, "maximum": 1000},
    {"type": "number", "multipleOf": 0.125},
    {"type": "number", "not": {"multipleOf": 3}},
    {"type": "integer", "not": {"enum": [0, 5, 10]}, "minimum": 0},
    {"enum": [0.1, 1, 1e300, -3]},
]


def _numerals() -> list[str]:
    choose = random.Random(0)
    texts = [str(n) for n in range(-130, 130)]
    for number in (0.1, 0.3, 1.0, -2.5, 1000.0, 12345678901234568.0):
        for neighbour in (math.nextafter(number, -math.inf), number, math.nextafter(number, math.inf)):
            texts += [repr(neighbour), str(Decimal(neighbour))[:40], f"{neighbour:.15f}", f"{neighbour:.20f}"]
    for _ in range(300):
        texts.append(str(round(choose.uniform(-200, 200), choose.randint(1, 6))))
        texts.append(json.dumps(choose.uniform(-1, 1) * 10 ** choose.randint(-30, 30)))
    return [*texts, "1e5", "1E-05", "-0.0", "99999999999999999999", "0.00000000000000000001", "2520", "-3600"]


NUMERALS = _numerals()


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_only_valid_numerals_and_all_usual_ones(schema, compiled, accepts_text):
    grammar = compiled(schema)
    validator = jsonschema.Draft202012Validator({**schema, "type": schema.get("type", "number")})
    refused = []
    for text in NUMERALS:
        number = json.loads(text)
        accepted = accepts_text(grammar, text)
        assert not accepted or validator.is_valid(number), text
        if validator.is_valid(number) and not accepted:
            refused.append(text)
    written_otherwise = [t for t in refused if not _is_usual(t, schema)]
    assert refused == written_otherwise


def _is_usual(text: str, schema: dict[str, Any]) -> bool:
    """Written as the documentation promises: integers without a point, others as decimals of moderate length."""
    number = json.loads(text)
    if isinstance(number, int):
        return len(text) <= 18
    if number == int(number) or "e" in text.lower() or text != json.dumps(number):
        return False
    digits = len(text.strip("-").replace(".", "").lstrip("0"))
    return digits <= 15 if "not" in schema else digits <= 17 and schema.get("multipleOf") is None


@pytest.mark.parametrize("seed", range(20))
def test_ranges_with_a_point_are_those_of_the_doubles(seed):
    """Decimals one last place around the end of a range, judged by reading them."""
    choose = random.Random(seed)
    bound = choose.choice([choose.uniform(-10, 10), choose.random() * 1e-3, float(choose.randint(-20, 20))])
    inclusive = choose.random() < 0.5
    least = Bound(Fraction(bound), inclusive)
    above, below = (
        to_dfa(numerals.with_point(least, None), Effort()),
        to_dfa(numerals.with_point(None, least), Effort()),
    )
    for end in (bound, math.nextafter(bound, math.inf), math.nextafter(bound, -math.inf)):
        centre = int(Fraction(end) * numerals.SCALE)
        gap = int(Fraction(math.ulp(end)) * numerals.SCALE)
        for offset in (0, 1, -1, gap // 2, gap // 2 + 1, -gap // 2, gap // 2 - 1, gap, -gap):
            text = f"{Decimal(centre + offset) / numerals.SCALE:.20f}"
            if float(text) == 0 and text.startswith("-"):
                continue
            number = float(text)
            assert above.accepts(text.encode()) == (number > bound or (inclusive and number == bound)), text
            assert below.accepts(text.encode()) == (number < bound or (inclusive and number == bound)), text


@pytest.mark.parametrize(
    ("first", "last"), [(0, 0), (0, 9), (1, 10), (7, 105), (99, 1001), (10, 99), (100, 2345)]
)
def test_naturals(first, last):
    dfa = to_dfa(numerals.naturals(first, last), Effort())
    assert [n for n in range(3000) if dfa.accepts(str(n).encode())] == list(range(first, last + 1))
    assert not dfa.accepts(b"00")
    assert not dfa.accepts(b"")
