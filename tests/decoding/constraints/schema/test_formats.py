"""Formats: inside what the `jsonschema` package accepts, and wide enough for what people write."""

import random

import jsonschema
import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions
from cadenza.decoding.constraints.schema.formats import ANNOTATIONS, PATTERNS, format_expression

EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "date": (
        ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01", "2023-04-30"],
        [
            "2023-02-29",
            "1900-02-29",
            "2023-04-31",
            "0000-01-01",
            "2023-13-01",
            "2023-1-1",
            "2023-00-10",
            "23-01-01",
        ],
    ),
    "time": (
        ["12:00:00Z", "23:59:59.123+05:30"],
        ["24:00:00Z", "12:00:00", "12:60:00Z", "12:00:00.Z", "12:00Z"],
    ),
    "date-time": (
        ["2024-02-29T00:00:00Z", "1985-04-12T23:20:50.52-08:00"],
        ["2023-02-29T00:00:00Z", "2024-01-01 00:00:00Z"],
    ),
    "duration": (["P1Y2M3DT4H5M6S", "P3W", "PT0S", "P1D"], ["P", "PT", "P1Y3D", "1D", "P1W2D", "P1H"]),
    "email": (
        ["a@b.co", "x.y+z@sub.example.org", "joe@localhost"],
        ["a", "@b", "a@", "a..b@c", "a@-b.c", "a b@c"],
    ),
    "hostname": (
        ["example.com", "a", "a-b.c1", "x" * 63 + ".org"],
        ["-a", "a-", "a..b", "x" * 64, "a_b", ""],
    ),
    "ipv4": (["0.0.0.0", "255.255.255.255", "192.168.1.10"], ["256.0.0.1", "01.2.3.4", "1.2.3", "1.2.3.4.5"]),
    "ipv6": (
        ["::", "::1", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4"],
        ["1:2", ":::", "1::2::3", "12345::", "1:2:3:4:5:6:7:8:9"],
    ),
    "uuid": (
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "g23e4567-e89b-12d3-a456-426614174000"],
    ),
    "uuid4": (["123e4567-e89b-42d3-a456-426614174000"], ["123e4567-e89b-12d3-a456-426614174000"]),
    "uri": (
        ["http://a.b/c?d=e#f", "mailto:a@b.c", "urn:isbn:0451450523", "https://[::1]:80/"],
        ["/a", "a b:c", "http://a b", "", "://x"],
    ),
    "uri-reference": (["", "/a", "../b?c", "#f", "http://x/", "a/b:c"], ["a b", "%zz", ":a"]),
    "iri": (["http://exämple.com/ü"], ["ü"]),
    "json-pointer": (["", "/a/b~0c~1d", "/"], ["a", "/~2", "/~"]),
    "relative-json-pointer": (["0", "1/a", "2#"], ["/a", "-1", "01"]),
    "uri-template": (["http://x/{id}{?q,r*}", "a{+b:3}"], ["{", "a}b", "{a b}"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    dfa = to_dfa(format_expression(name), Effort())
    good, bad = EXAMPLES[name]
    assert [text for text in good if not dfa.accepts(text.encode())] == []
    assert [text for text in bad if dfa.accepts(text.encode())] == []


@pytest.mark.parametrize("name", PATTERNS)
def test_every_text_passes_the_checker(name):
    """Random ways through the automaton; formats that the checker does not know pass trivially."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    dfa = to_dfa(format_expression(name), Effort())
    choose = random.Random(name)
    for _ in range(60):
        state, text = 0, bytearray()
        for _ in range(choose.randint(0, 50)):
            following = [byte for byte in range(256) if dfa.next(state, byte) >= 0]
            if not following:
                break
            text.append(choose.choice(following))
            state = dfa.next(state, text[-1])
        text += dfa.shortest(state)
        checker.check(text.decode(), name)


@pytest.mark.parametrize("name", sorted(ANNOTATIONS))
def test_annotations_restrict_nothing(name, compiled, accepts_value):
    grammar = compiled({"format": name})
    assert all(accepts_value(grammar, value) for value in ("", "any text", 2**70, 1.5))


def test_formats_combine_with_other_keywords(compiled, accepts_value):
    grammar = compiled({"type": "string", "format": "date", "pattern": "^20", "not": {"const": "2024-01-01"}})
    assert accepts_value(grammar, "2024-01-02")
    assert not accepts_value(grammar, "2024-01-01")
    assert not accepts_value(grammar, "1999-01-01")
    either = compiled({"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "ipv4"}]})
    assert accepts_value(either, "1.2.3.4")
    assert accepts_value(either, "2024-01-01")


def test_formats_can_be_annotations(compiled, accepts_value):
    grammar = compiled({"type": "string", "format": "nobody knows it"}, SchemaOptions(format_assertion=False))
    assert accepts_value(grammar, "x")
