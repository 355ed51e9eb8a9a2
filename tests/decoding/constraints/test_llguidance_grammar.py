"""Grammars printed for llguidance against our own parser of the same grammars, which has no lexer at all.

At every beginning of a text that is tried, the bytes that llguidance allows next are the ones that the parser allows.
"""

import random
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from cadenza.decoding.constraints.automata.expression import (
    ANY_TEXT,
    NOTHING,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    optional,
    plus,
    star,
)
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar, Symbol
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.llguidance_grammar import to_llguidance
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher, MaskTables, check_llguidance
from cadenza.decoding.constraints.vocabulary import Vocabulary

EOS = 256
BYTES = MaskTables(Vocabulary([bytes([byte]) for byte in range(256)] + [b""], [EOS]))
Rules = Mapping[str, Iterable[Iterable[Symbol]]]


def rx(pattern: str) -> Expression:
    return parse_regex(pattern, "python", Effort())


def lit(text: str) -> Literal:
    return Literal(text)


def grammar_of(rules: Rules) -> Grammar:
    return Grammar("start", {name: tuple(map(tuple, productions)) for name, productions in rules.items()})


def allowed(matcher: MaskMatcher) -> list[int]:
    row = np.zeros(BYTES.vocabulary.num_words, np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def expected(parser: Parser) -> list[int]:
    return [*parser.next_bytes(), *([EOS] if parser.is_complete else [])]


def check_walks(
    grammar: Grammar, seed: int, *, walks: int = 12, length: int = 24, likely: bytes = b""
) -> str:
    """Random texts. likely: bytes that lead into the grammar's traps. Answers what llguidance was given."""
    text, compiled = to_llguidance(grammar, Effort()), compile_grammar(grammar, Effort())
    rng = random.Random(seed)
    for _ in range(walks):
        matcher, parser, so_far = MaskMatcher.build(text, BYTES), Parser(compiled), b""
        for _ in range(length):
            assert allowed(matcher) == expected(parser), (so_far, text)
            choices = list(parser.next_bytes())
            if not choices:
                break
            traps = [byte for byte in choices if byte in likely]
            byte = rng.choice(traps if traps and rng.random() < 0.7 else choices)
            so_far += bytes([byte])
            assert parser.advance(bytes([byte]))
            matcher.advance(byte)
    return text


WS = rx(r"[ \t\n]*")
IDENT = rx("[a-z_][a-z_0-9]*")
STRING = rx(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*"')
NUMBER = rx(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
INTEGER = rx("-?(?:0|[1-9][0-9]*)")


def without(*words: str) -> Expression:
    """Text that contains none of the words."""
    return And(tuple(Not(Concat((ANY_TEXT, lit(word), ANY_TEXT))) for word in words))


TRAPS: dict[str, tuple[Rules, bytes]] = {
    "a keyword that begins an identifier": (
        {
            "start": [["statement", "start"], ["statement"]],
            "statement": [
                [lit("let"), WS, IDENT, WS, lit(";")],
                [IDENT, WS, lit("="), WS, rx("[0-9]+"), WS, lit(";")],
            ],
        },
        b"let=1;",
    ),
    "a word and then a letter": ({"start": [[rx("[a-z]+"), lit("x")]]}, b"x"),
    "a literal as long as two terminals": (
        {"start": [[lit("in"), lit("x")], [rx("[a-z]"), rx("[a-z]"), lit("y")]]},
        b"inxy",
    ),
    "a number before a dot": (
        {"start": [[rx("[0-9]+"), lit("."), "start"], [rx(r"[0-9]+(\.[0-9]+)?")]]},
        b"0.",
    ),
    "literals that overlap": (
        {"start": [["w"], ["w", "start"]], "w": [[lit("a")], [lit("ab")], [lit("abc")], [lit("bc")]]},
        b"abc",
    ),
    "blanks that are skipped": (
        {
            "start": [[WS, "sum", WS]],
            "sum": [["sum", WS, lit("+"), WS, "term"], ["term"]],
            "term": [[rx("[0-9]+")], [lit("("), WS, "sum", WS, lit(")")]],
        },
        b" 1+()",
    ),
    "blanks beside blanks": ({"start": [[WS, WS, rx(r"\s+"), lit("a"), WS, "start"], []]}, b" a"),
    "terminals that match nothing": (
        {
            "start": [[rx("a*"), rx("b*"), "n", rx("(?:ab)?")]],
            "n": [[], [rx("a?"), lit("c"), "n"], [lit("")]],
        },
        b"abc",
    ),
    "characters with a common first byte": (
        {"start": [[rx("[é-ž]+"), lit("è")], [rx("[α-ω]*"), lit("ω"), lit("!")]]},
        "éèα".encode(),
    ),
    "characters in literals": (
        {"start": [[lit("é"), "start"], [lit("éè"), lit("x")], [rx("[à-ÿ]{1,3}")], [lit("😀"), lit("😁")]]},
        "éèx".encode(),
    ),
    "free text before a tag": (
        {
            "start": [
                [without("<tool>")],
                [without("<tool>"), lit("<tool>"), rx("[a-z]+"), lit("</tool>"), "start"],
            ]
        },
        b"<tool>/",
    ),
    "free text before either of two tags": (
        {
            "start": [
                [without("<a>", "<ab>")],
                [without("<a>", "<ab>"), "tag", "start"],
            ],
            "tag": [[lit("<a>"), without("</a>"), lit("</a>")], [lit("<ab>"), INTEGER]],
        },
        b"<ab>/0",
    ),
    "brackets": ({"start": [[], [lit("("), "start", lit(")"), "start"]]}, b"()"),
    "a palindrome": ({"start": [[], [lit("a"), "start", lit("a")], [lit("b"), "start", lit("b")]]}, b"ab"),
    "many readings": (
        {"start": [["start", "start"], [lit("a")], [lit("aa")], [rx("a+b")]]},
        b"ab",
    ),
    "strings and what follows them": (
        {"start": [[rx('"[^"]*"'), "start"], [rx('"[^"]*"!')], [lit('"x"?')]]},
        b'"!x?',
    ),
    "all words but some": (
        {
            "start": [
                [And((IDENT, Not(either(lit("if"), lit("else"))))), lit("="), rx("[0-9]+")],
                [lit("if"), lit(" "), IDENT],
                [lit("else"), IDENT],
            ]
        },
        b"ifelse= 0",
    ),
    "a long count": ({"start": [[rx("[a-z]{1,64}"), lit("q"), rx("[0-9]{2,5}"), rx("[0-9]")]]}, b"q0"),
    "keywords without blanks between": (
        {
            "start": [[lit("select"), WS, "columns", WS, lit("from"), WS, IDENT, "where"]],
            "columns": [[lit("*")], [IDENT], [IDENT, WS, lit(","), WS, "columns"]],
            "where": [[], [WS, lit("where"), WS, "condition"]],
            "condition": [
                [IDENT, WS, "operator", WS, "value"],
                ["condition", WS, lit("and"), WS, "condition"],
                [lit("not"), WS, "condition"],
            ],
            "operator": [[lit("=")], [lit("<")], [lit("<=")]],
            "value": [[IDENT], [INTEGER], [rx("'[^']*'")]],
        },
        b"selctfromwhando *='0",
    ),
    "a rule that derives nothing": (
        {"start": [["never", "start"], [lit("a")], [NOTHING, lit("b")]], "never": [[lit("x"), "never"]]},
        b"a",
    ),
    "rules that lead back to themselves": (
        {"start": [["start"], ["b"], [lit("x")]], "b": [["start"], [lit("y"), "b"]]},
        b"xy",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    rules, likely = TRAPS[name]
    check_walks(grammar_of(rules), seed=len(name), likely=likely)


JSON: Rules = {
    "start": [[WS, "value", WS]],
    "value": [
        [STRING],
        [NUMBER],
        [lit("true")],
        [lit("false")],
        [lit("null")],
        [lit("["), WS, lit("]")],
        [lit("["), WS, "value", "values", WS, lit("]")],
        [lit("{"), WS, lit("}")],
        [lit("{"), WS, "member", "members", WS, lit("}")],
    ],
    "values": [[], [WS, lit(","), WS, "value", "values"]],
    "member": [[STRING, WS, lit(":"), WS, "value"]],
    "members": [[], [WS, lit(","), WS, "member", "members"]],
}
OTHER_NAME = And((STRING, Not(either(lit('"name"'), lit('"age"')))))
OBJECT: Rules = {
    "start": [[rx(r"\{ ?"), "name"], [lit("{}")]],
    "name": [[lit('"name"'), rx(" ?: ?"), STRING, "after_name"], ["age"]],
    "after_name": [[rx(" ?, ?"), "age"], [rx(" ?}")]],
    "age": [[lit('"age"'), rx(" ?: ?"), either(INTEGER, lit("null")), "more"]],
    "more": [
        [rx(" ?, ?"), And((STRING, Not(either(lit('"name"'), lit('"age"'))))), rx(" ?: ?"), "any", "more"],
        [rx(" ?}")],
    ],
    "any": [[STRING], [NUMBER], [lit('"x"')], [rx('"[a-f]{2,4}"')]],
}


@pytest.mark.parametrize(("rules", "num_rules"), [(JSON, 6), (OBJECT, 7)], ids=["json", "object"])
def test_no_terminal_of_json_is_cut(rules: Rules, num_rules: int) -> None:
    """A cut makes a rule. One is for blanks, which may be absent; one for the repetition of members."""
    text = check_walks(grammar_of(rules), seed=1, likely=b'"name:{}[],1ax')
    assert len(re.findall(r"^r\d+:", text, re.MULTILINE)) == num_rules


def test_free_text_is_cut_only_where_a_tag_may_begin() -> None:
    """Not at every character: masks would take much longer."""
    rules, _ = TRAPS["free text before a tag"]
    text = to_llguidance(grammar_of(rules), Effort())
    assert len(text.splitlines()) < 12


def random_expression(rng: random.Random, depth: int) -> Expression:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        word = "".join(rng.choices("abé", k=rng.choice([0, 1, 1, 2, 3])))
        return rng.choice([lit(word), CharSet.chars("".join(rng.sample("abé", rng.randint(1, 2))))])
    parts = [random_expression(rng, depth - 1) for _ in range(3)]
    if kind < 0.5:
        return Concat(tuple(parts[: rng.randint(0, 3)]))
    if kind < 0.65:
        return Alternation(tuple(parts[: rng.randint(0, 3)]))
    if kind < 0.85:
        low = rng.choice([0, 0, 1, 2])
        return Repeat(parts[0], low, rng.choice([None, low, low + 1, low + 2, 1]))
    if kind < 0.93:
        return And((parts[0], parts[1]))
    return And((star(CharSet.chars("abé")), Not(parts[0])))


def random_grammar(rng: random.Random) -> Grammar:
    names = ["start", "first", "second", "third"][: rng.randint(1, 4)]
    terminals = [random_expression(rng, rng.randint(0, 3)) for _ in range(rng.randint(1, 4))]

    def production() -> list[Symbol]:
        return [rng.choice(names if rng.random() < 0.35 else terminals) for _ in range(rng.randint(0, 3))]

    return grammar_of({name: [production() for _ in range(rng.randint(1, 3))] for name in names})


def derives_nothing(grammar: Grammar) -> bool:
    try:
        compile_grammar(grammar, Effort())
    except ConstraintError:
        return True
    return False


@pytest.mark.parametrize("seed", range(80))
def test_random_grammars(seed: int) -> None:
    """Breadth first: every text of a few characters, until there are many."""
    grammar = random_grammar(random.Random(seed))
    if derives_nothing(grammar):
        with pytest.raises(ConstraintError, match="no text satisfies"):
            to_llguidance(grammar, Effort())
        return
    text = to_llguidance(grammar, Effort())
    beginnings = [(Parser(compile_grammar(grammar, Effort())), MaskMatcher.build(text, BYTES))]
    for _ in range(5):
        longer = []
        for parser, matcher in beginnings[:12]:
            assert allowed(matcher) == expected(parser), (grammar, text)
            for byte in parser.next_bytes():
                following, fork = parser.fork(), matcher.fork()
                following.advance(bytes([byte]))
                fork.advance(byte)
                longer.append((following, fork))
        beginnings = longer


NOT_AB = And((star(CharSet.chars("abcé;")), Not(either(lit("ab"), lit("a")))))
SINGLE = {
    "an intersection and then one of two ends": Concat((lit("<"), NOT_AB, lit(">"), optional(lit(" ")))),
    "an intersection and then what it may end in": Concat((NOT_AB, plus(lit(";")), optional(lit("a")))),
    "an intersection and then another": Concat((Not(lit("ab")), lit(";"), Concat((NOT_AB, lit("!"))))),
    "an intersection without the empty text": concat(lit("<"), And((ANY_TEXT, Not(lit("")))), lit("\n>")),
    "only an intersection without the empty text": And((star(CharSet.chars("ab")), Not(lit("ab")))),
    "quotes and slashes": lit("\"/\\'\x7f\n\t\x00#//"),
    "a class of signs": plus(CharSet.chars("/\\]^-[\"'#\x00\n\x7f&~| ")),
    "astral": concat(lit("😀"), CharSet.of([(0x10000, 0x10FFFF)])),
    "all but some": Not(star(CharSet.chars("ab"))),
    "anything": ANY_TEXT,
    "word characters": rx(r"\w{2,3}\d?"),
    "complement inside": concat(lit("<"), Not(Concat((ANY_TEXT, lit(">"), ANY_TEXT))), lit(">")),
    "complement repeated": Repeat(concat(And((plus(CharSet.chars("abc")), Not(lit("ab")))), lit(";")), 2, 4),
    "many options": Alternation(tuple(lit(f"word{number}") for number in range(400))),
    "options of options": optional(either(plus(either(lit("a"), lit("bc"))), concat(lit("x"), lit("")))),
    "a long count": Repeat(CharSet.chars("ab"), 3, 2000),
    "nested complement": Not(Not(And((star(CharSet.chars("é😀a")), Not(lit("é")))))),
}


@pytest.mark.parametrize("name", SINGLE)
def test_expressions(name: str) -> None:
    check_walks(grammar_of({"start": [[SINGLE[name]]]}), seed=3, walks=8, likely=b'"/\\<>ab;1word')


def test_a_complement_matches_only_utf8() -> None:
    """llguidance's own operator is by bytes."""
    matcher = MaskMatcher.build(to_llguidance(grammar_of({"start": [[Not(lit("a"))]]}), Effort()), BYTES)
    assert set(range(256)) - set(allowed(matcher)) == {*range(0x80, 0xC2), *range(0xF5, 0x100)}
    matcher.advance(0xED)
    assert set(allowed(matcher)) == set(range(0x80, 0xA0))  # surrogates are not characters


def test_a_grammar_without_texts_is_refused() -> None:
    with pytest.raises(ConstraintError, match="no text satisfies the constraint"):
        to_llguidance(grammar_of({"start": [[lit("a"), "start"]]}), Effort())


def test_a_surrogate_is_refused() -> None:
    with pytest.raises(ConstraintError, match="surrogate"):
        to_llguidance(grammar_of({"start": [[lit("\ud800")]]}), Effort())


def test_a_rule_that_is_not_defined_is_refused() -> None:
    with pytest.raises(ConstraintError, match="'other' is not defined"):
        to_llguidance(grammar_of({"start": [["other"]]}), Effort())


def properties(count: int) -> Grammar:
    """An object of optional members in order."""
    rules: dict[str, list[list[Symbol]]] = {"start": [[lit("{"), "p0", lit("}")]], f"p{count}": [[]]}
    for i in range(count):
        rules[f"p{i}"] = [[lit(f'"name{i}":'), STRING, f"q{i}"], [f"p{i + 1}"]]
        rules[f"q{i}"] = [[lit(","), f"p{i + 1}"], []]
    return grammar_of(rules)


def test_deep_rules_are_read_on_a_large_stack() -> None:
    """Read on an ordinary one, a third of these rules ends the process."""
    text = to_llguidance(properties(3000), Effort(Limits(max_seconds=5)))
    check_llguidance(text)
    matcher = MaskMatcher.build(text, BYTES)
    for byte in b'{"name2999":"x"}':
        matcher.advance(byte)
    assert allowed(matcher) == [EOS]


HOSTILE: dict[str, Rules] = {
    "too many rules": {
        "start": [["r0"]],
        **{f"r{i}": [[f"r{i + 1}"], [lit(f"{i}")]] for i in range(30_000)},
        "r30000": [[]],
    },
    "nested literals": {"start": [[], *([lit("a" * i), "start"] for i in range(3000))]},
    "exponential automata": {"start": [[rx("[ab]*a[ab]{30}"), rx("[ab]*b[ab]{30}"), "start"], []]},
    "terminals that match alike": {
        "start": [[], *([Repeat(rx(f"a{{{i}}}b?"), 1, 40), "start"] for i in range(1, 200))]
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end(name: str) -> None:
    with pytest.raises(ConstraintTooComplex):
        check_llguidance(to_llguidance(grammar_of(HOSTILE[name]), Effort(Limits(max_seconds=1))))
