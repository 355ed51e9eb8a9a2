"""What samples answer: each rule on texts as models write them, when answers are equal, and what looking may cost."""

import random
import time
from decimal import Decimal

import pytest

from cadenza.decoding.request import RequestError
from cadenza.decoding.voting.answer import FullText, LastNumber, Pattern, Pointer, answer_of


def key(text: str) -> str | None:
    answer = answer_of(text)
    return None if answer is None else answer.key


@pytest.mark.parametrize(
    "equal",
    [
        ["42", "42.0", " 42.", '"42"', "$42", "42 %", "+42", "(42)", "**42**", "4.2e1", "0042", "42.000"],
        ["1000", "1,000", "1,000.00", "1e3", "1E+3", "$1,000.", "€1000"],
        ["-3.5", "−3.5", "-3.50", '"-3.5"', "-$3.5", "$-3.5", "-35e-1"],
        ["0.05", ".05", "0.050", "5e-2"],
        ["0", "-0", "0.00", "0e5"],
        ["100000000000000000000000000000000000001", "100,000,000,000,000,000,000,000,000,000,000,000,001"],
        ["Paris", "paris.", "  PARIS ", "'Paris'!", "“Paris”", "- paris"],
        ["the big apple", "The  Big\nApple", "The Big Apple."],
        ["Straße", "STRASSE"],
        ["caf\u00e9", "cafe\u0301"],
        ['{"a": 1, "b": [2, "X "]}', '{"b":[2.0,"x"],"a":1.00}', '{"b" : [2e0, "x."],\n "a" : 1}'],
        ["[]", "[ ]"],
    ],
)
def test_equal_answers(equal: list[str]) -> None:
    assert len({key(text) for text in equal}) == 1


@pytest.mark.parametrize(
    "different",
    [
        ["1", "-1", "10", "0.1", "1,00", "1/2", "1e-1x", "x1"],
        ["100000000000000000000000000000000000001", "100000000000000000000000000000000000002"],
        ["+", "-", "*", "...", "?"],
        ["x²", "x2"],
        ['{"a": 1}', '{"a": "1"}', '{"a": 1, "b": null}', '{"A": 1}', "[1]", "[[1]]", '["1"]'],
        ["{1, 2}", "{1, 3}"],
    ],
)
def test_different_answers(different: list[str]) -> None:
    assert len({key(text) for text in different}) == len(different)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_white_space_answers_nothing(text: str) -> None:
    assert FullText()(text) is None


def test_numbers_are_equal_exactly_when_their_values_are() -> None:
    """Against the decimal module, on random ways to write random numbers."""
    draw = random.Random(7)
    seen: dict[Decimal, str] = {}
    for _ in range(3000):
        digits = str(draw.randrange(10 ** draw.choice((1, 2, 30))))
        text = draw.choice(("", "-")) + digits
        text += draw.choice(("", f".{draw.randrange(30)}", ".0", ".500"))
        text += draw.choice(("", "", f"e{draw.randrange(-3, 4)}"))
        value = Decimal(text).copy_abs() if Decimal(text) == 0 else Decimal(text)
        written = key(text)
        assert written is not None
        assert seen.setdefault(value, written) == written
        assert Decimal(written) == value
        assert key(written) == written
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays $1,234.50.", "1234.5"),
        ("So 3 + 4 = 7", "7"),
        ("it is -3.", "-3"),
        ("it is −3", "-3"),
        ("10-5", "5"),
        ("x=-5", "-5"),
        ("about 1e3 or so", "1000"),
        ("\\boxed{72}", "72"),
        ("25%", "25"),
        ("12 kg", "12"),
        ("12kg of CO2", "12"),
        ("wait... 42", "42"),
        ("...42", "42"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,000,000 people", "1000000"),
        ("12,34", "34"),
        ("version 1.2.3", "1.2"),
        ("-$5 and", "-5"),
        ("0.10", "0.1"),
        ("5e", "5"),
        ("1e99999999999", "1"),
        ("H2O and x7", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    answer = LastNumber()(text)
    assert (answer and answer.text) == number


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"answer is (\w+)", "The answer is Blue. No: the answer is RED!", "RED"),
        (r"(?P<why>\w+) so (?P<answer>\w+)", "a so b", "b"),
        (r"\d+ apples", "3 apples, 4 apples, 5 pears", "4 apples"),
        (r"A(\d)?", "A1 A2 A", "2"),
        (r"(?i)answer:\s*(.*)", "ANSWER: 1,000.0", "1000"),
        (r"#### (\S+)", "no marker", None),
        (r"x*", "abc", None),
        (r"(?<== )\p{L}+", "= été", "été"),
    ],
)
def test_pattern(pattern: str, text: str, answer: str | None) -> None:
    found = Pattern(pattern)(text)
    assert (found and found.text) == answer


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{2,1}", "(?P<answer>", "", "a" * 1001, "(" * 500 + ")" * 500, r"\L<x>"]
)
def test_a_bad_pattern_is_named(pattern: str) -> None:
    with pytest.raises(RequestError) as caught:
        Pattern(pattern)
    assert caught.value.param == "self_consistency.answer.regex"


@pytest.mark.parametrize(
    ("pattern", "piece"),
    [
        (r"(x+x+)+y", "x"),
        (r"(?:x?){400}x{400}y?", "x"),
        (r"(?p)(x|xx|xxx)*", "x"),
        (r"(?b)(?:foobarbaz){e<=8}", "fobrza"),
    ],
)
def test_a_hanging_pattern_fails_in_time(pattern: str, piece: str) -> None:
    """Hours of work, some of them; the bound is a tenth of a second."""
    rule, started = Pattern(pattern), time.monotonic()
    with pytest.raises(RequestError, match="takes longer") as caught:
        rule(piece * 30_000)
    assert time.monotonic() - started < 5
    assert caught.value.param == "self_consistency.answer.regex"


ANSWER = Pointer("/answer")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"answer": 42.0}', "42"),
        ('{"answer": "42"}', "42"),
        ('Let me think [1].\n```json\n{"answer": "Paris"}\n```\nDone }', "Paris"),
        ('{"answer": 1} then {"answer": 2}', "2"),
        ('{"answer": 1} then {"other": 2}', "1"),
        ('{"answer": 1, "inner": {"answer": 2}}', "1"),
        ('{"answer": 1} {"answer": 2', "1"),
        ('{"answer": true}', "true"),
        ('{"answer": null}', None),
        ('{"answer": 1} {"answer": null}', None),
        ('{"answer": {"b": 1, "a": "x  y"}}', '{"a":"x y","b":1}'),
        ('{"answer": NaN}', None),
        ('{"answer": "\\ud800"}', None),
        ('{"answer": ""}', None),
        ("[1, 2]", None),
        ("42", None),
        ("", None),
        ("{" * 5000 + '{"answer": 3}', "3"),
    ],
)
def test_pointer(text: str, answer: str | None) -> None:
    found = ANSWER(text)
    assert (found and found.text) == answer


@pytest.mark.parametrize(
    ("pointer", "found"),
    [
        ("", "x"),
        ("/foo", '["bar","baz"]'),
        ("/foo/0", "bar"),
        ("/", "0"),
        ("/a~1b", "1"),
        ("/c%d", "2"),
        ("/e^f", "3"),
        ("/g|h", "4"),
        ("/i\\j", "5"),
        ('/k"l', "6"),
        ("/ ", "7"),
        ("/m~0n", "8"),
        ("/foo/00", None),
        ("/foo/-", None),
        ("/foo/2", None),
        ("/foo/0/x", None),
        ("/nope", None),
    ],
)
def test_the_pointers_of_rfc_6901(pointer: str, found: str | None) -> None:
    document = (
        r'{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4,'
        r' "i\\j": 5, "k\"l": 6, " ": 7, "m~n": 8}'
    )
    answer = Pointer(pointer)(document)
    if pointer == "":
        assert answer is not None
        assert answer.key == key(document)
    else:
        assert (answer and answer.text) == found


@pytest.mark.parametrize("pointer", ["answer", "#/answer", "/a~", "/a~2"])
def test_a_bad_pointer_is_named(pointer: str) -> None:
    with pytest.raises(RequestError) as caught:
        Pointer(pointer)
    assert caught.value.param == "self_consistency.answer.json_pointer"


@pytest.mark.parametrize("piece", ["[", "{", '{"a":', '["', '{"a":1', "[1,", '[{"answer":1},', "1,111", "“"])
def test_hostile_texts_cost_little(piece: str) -> None:
    """300,000 characters of what a constraint could make a model write: a context of 100,000 tokens."""
    text, started = piece * (300_000 // len(piece)), time.monotonic()
    for rule in (ANSWER, LastNumber(), FullText()):
        rule(text)
    assert time.monotonic() - started < 3
