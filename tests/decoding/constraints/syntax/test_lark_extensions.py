"""What goes beyond the comparison with Lark: llguidance's operators and schemas, lazy quantifiers, ignored comments."""

import itertools
import re
from collections.abc import Callable

import lark
import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.lark_common import COMMON, common_terminal
from cadenza.decoding.constraints.syntax.text import grammar_from_text

Judge = Callable[[str], Callable[[str], bool]]


@pytest.mark.parametrize(
    ("text", "members", "others"),
    [
        ("start: A\nA: /[a-z]+/ & /.*x.*/", ["x", "axb"], ["", "ab", "x1"]),
        ("start: A\nA: /[a-c]+/ & ~/.*b.*/ & ~(B | /.*cc.*/)\nB: /a/", ["c", "ac", "aa"], ["a", "ab", "acc"]),
        ('start: A "!"\nA: "a" ~"b"', ["a!", "abc!", "a!!"], ["ab!", "b!"]),
        ('start: "x" %json {"type": "integer", "minimum": 0} "y"', ["x12y"], ["xy", "x-1y", "x1.5y"]),
        ('start: v ("," v)*\nv: %json {"enum": [1, "a"]}\n%ignore " "', ['1, "a" ,1 '], ["1,", '"b"']),
        ('%llguidance {}\nstart: "a"', ["a"], ["b"]),
        ('start: BNF+\nBNF: "x ::= y"', ["x ::= y"], ["x"]),
        ('start: "a" \\\n  "b"', ["ab"], ["a"]),
        ("start: a\na:\n  | 'x'".replace("'", '"'), ["", "x"], ["xx"]),
        ('start: "a"\n// only a comment at the end', ["a"], [""]),
        ("start: /\\//", ["/"], ["\\/"]),
        ('unused: "x" | unused\nstart: "a"\nUNUSED: "b"', ["a"], ["x", "b"]),
    ],
)
def test_language(text: str, members: list[str], others: list[str], grammar: Judge) -> None:
    accepts = grammar(text)
    assert {member: accepts(member) for member in members} == dict.fromkeys(members, True)
    assert {other: accepts(other) for other in others} == dict.fromkeys(others, False)


@pytest.mark.parametrize(
    "pattern", ['/".*?"/', "/<!--.*?-->/", "/a*?b/", "/(a|b)+?a/", "/ab??/", "/[ab]{2,}?a/", "/a{2}?b/"]
)
def test_lazy_quantifiers_mean_the_shortest_match(pattern: str, grammar: Judge) -> None:
    source = f'start: T ("," T)* ";"?\nT: {pattern}\n'
    accepts = grammar(source)
    truth = lark.Lark(source, parser="earley", lexer="dynamic_complete")
    pieces = ['"', "a", "b", ",", ";"] if "<" not in pattern else ["<!--", "-->", "a", ",", ">"]
    for candidate in map("".join, itertools.chain(*[itertools.product(pieces, repeat=n) for n in range(6)])):
        try:
            truth.parse(candidate)
            expected = True
        except lark.exceptions.UnexpectedInput:
            expected = False
        assert accepts(candidate) == expected, candidate


SAMPLES = [
    "", "0", "12", "+3", "-4.", ".5", "1.5e-3", "2E+", "e5", "a", "Zz", "_x9", "9x", " ", "\t ", "\n", "\r\n\n", "\r",
    '""', '"a"', '"a\\"b"', '"a\\\\"', '"a\nb"', '"a"b"', '"\\', "#", "# a", "# a\n", "// x", "/x", "/**/", "/* * */",
    "/*/", "/* a */ */", "-- q", "- q", "fF0", "g", "\f",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMON)
def test_common_terminals_match_what_larks_do(name: str) -> None:
    """Lark's lazy ones match more by themselves than a lexer takes: those texts end in the terminal twice."""
    parser = lark.Lark(f"start: {name}\n%import common.{name}", parser="earley", lexer="basic")
    pattern = next(t.pattern.to_regexp() for t in parser.terminals if t.name == name)
    expression = common_terminal(name, Effort())
    assert expression is not None
    dfa = to_dfa(expression, Effort())
    for sample in SAMPLES:
        found = re.match(pattern, sample)
        assert dfa.accepts(sample.encode()) == (found is not None and found.end() == len(sample)), sample


def test_no_terminal_begins_inside_a_comment(grammar: Judge) -> None:
    accepts = grammar('start: ("a" ";")+ NL?\nNL: "\\n"\n%ignore /#[^\\n]*/\n%ignore " "')
    members = ["a;", "# a;", "a # ;\n", "a;# x", "a; # x\n", "a;# x\n# y"]
    assert {member: accepts(member) for member in members} == {
        "a;": True, "# a;": False, "a # ;\n": False, "a;# x": True, "a; # x\n": True, "a;# x\n# y": True,
    }  # fmt: skip


def test_ignored_space_is_not_given_back(grammar: Judge) -> None:
    accepts = grammar('start: "a" " b"? "c"\n%ignore /[ ]+/')
    assert [text for text in ["ac", "a c", "a bc", "a  bc", "a bc "] if accepts(text)] == [
        "ac", "a c", "a bc", "a bc ",
    ]  # fmt: skip


def test_a_thousand_words_are_one_terminal() -> None:
    words = " | ".join(f'"word{number}"' for number in range(1000))
    grammar = grammar_from_text(f'start: "(" start ")" | {words}\n%ignore " "', Effort())
    assert sum(len(productions) for productions in grammar.rules.values()) < 10
