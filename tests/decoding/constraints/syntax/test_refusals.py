"""Grammars that are wrong, unsupported or hostile: one clear error that says where, and soon."""

import resource
import time
from collections.abc import Callable

import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.syntax import choice_expression, grammar_from_text

LARK_REFUSED = [
    ("", "no rule 'start'", None),
    ("\0", "begins nothing", "line 1, column 1"),
    ('Start: "a"', "neither a rule", "line 1, column 1"),
    ('other: "a"', "no rule 'start'", None),
    ('start: "a', "the string does not end", "line 1, column 8"),
    ('start: "a" |\nstart: "b"', "'start' is defined twice", "line 2, column 1"),
    ('A: "a"\n%import common.WS -> A\nstart: A', "'A' is defined twice", "line 2, column 22"),
    ('start: ("a" "b"\n', "the bracket is not closed", "line 1, column 8"),
    ('start: "a")', "')' is out of place", "line 1, column 11"),
    ('start: ("a"]', "']' is out of place", "line 1, column 12"),
    ("start: *", "'*' is out of place", "line 1, column 8"),
    ('start: "a"**', "'*' is out of place", "line 1, column 12"),
    ('start: "a"~3..2', "3..2 is not a number", "line 1, column 12"),
    ('start: "a"~-1', "-1..-1 is not a number", "line 1, column 12"),
    ('start: ""', "is not empty", "line 1, column 8"),
    ('start: "a"\n"b"', "a rule, a terminal or a directive", "line 2, column 1"),
    ('start "a"', "`:` after 'start'", "line 1, column 7"),
    ("start: x\ny: z", "rule 'x' is not defined", "line 1, column 8"),
    ("start: A\nA: B C\nB: A", "terminal 'C' is not defined", "line 2, column 6"),
    ("start: A\nA: B\nB: A", "'A' is recursive", "line 2, column 4"),
    ("start: A\nA: start", "rule 'start' stands in a terminal", "line 2, column 4"),
    ('start: "z".."a"', "runs backwards", "line 1, column 8"),
    ('start: "ab".."c"', "from one character", "line 1, column 8"),
    ("start: /a", "does not end", "line 1, column 8"),
    ("start: /(a/", "in the regular expression", "line 1, column 8"),
    ("start: /^a/", "the anchor ^", "line 1, column 8"),
    (r"start: /a\b/", r"the assertion \b", "line 1, column 8"),
    ("start: /a(?=b)/", "lookaround (?=", "line 1, column 8"),
    ("start: /(?<!a)b/", "lookaround (?<!", "line 1, column 8"),
    ("start: /a+b*?/", "lazy quantifiers beside greedy", "line 1, column 8"),
    ("start: /(a)\\1/", "backreference", "line 1, column 8"),
    ("start: /a/l", "the flag l", "line 1, column 8"),
    ("start: /a\nb/", "stands on one line", "line 1, column 8"),
    (r'start: "\ud83d"', "surrogate", "line 1, column 8"),
    (r'start: "\Uffffffff"', "is not a character", "line 1, column 8"),
    ('start: "a" -> B', "the name of an alias", "line 1, column 15"),
    ('start: "a" -> b "c"', "the end of the alternative", "line 1, column 17"),
    ('start: A\nA: "a" -> b', "'->' is out of place", "line 2, column 8"),
    ('start: "a" & "b"', "& is only possible inside terminals", "line 1, column 12"),
    ('start: ~"b"', "~ is only possible inside terminals", "line 1, column 8"),
    (r"start: A" + "\n" + r"A: ~/\d/", r"the complement of \d", "line 1, column 1"),
    ("%declare A\nstart: A", "%declare is not supported", "line 1, column 1"),
    ('start: "a"\n%override start: "b"', "%override is not supported", "line 2, column 1"),
    ('start: "a"\n%extend start: "b"', "%extend is not supported", "line 2, column 1"),
    ("start: %regex {}", "%regex is not supported", "line 1, column 8"),
    ('start: %json {"type": "text"}', "in the JSON schema", "line 1, column 8"),
    ('start: %json {"type"', "JSON is expected", "line 1, column 21"),
    ("start: <|im_end|>", "special tokens", "line 1, column 8"),
    ("start: @other", "references @", "line 1, column 8"),
    ('start[lazy]: "a"', "attributes of 'start'", "line 1, column 6"),
    ('start: A\nA[max_tokens=3]: "a"', "attributes of 'A'", "line 2, column 2"),
    ('%llguidance {"no_forcing": true}\nstart: "a"', "options of %llguidance", "line 1, column 1"),
    ("%import python.NAME\nstart: NAME", "only `common`", "line 1, column 9"),
    ("%import .other.NAME\nstart: NAME", "only `common`", "line 1, column 9"),
    ("%import common.NAME\nstart: NAME", "no terminal 'NAME'", "line 1, column 16"),
    ('%ignore start\nstart: "a"', "rule 'start' stands in a terminal", "line 1, column 9"),
    ("%include x", "a directive is expected", "line 1, column 1"),
    ('start: t{"a"}', "rule 't' is not defined", "line 1, column 8"),
    ('start: t{"a", "b"}\nt{x}: x', "takes 1 arguments, not 2", "line 1, column 8"),
    ("start: t\nt{x}: x", "template 't' needs its arguments", "line 1, column 8"),
    ('start: t{("a")}\nt{x}: x', "'(' is out of place", "line 1, column 10"),
]

GBNF_REFUSED = [
    ('start ::= "a"', "no rule 'root'", None),
    ("root ::= item", "rule 'item' is not defined", "line 1, column 10"),
    ('root ::= "a', "the string does not end", "line 1, column 10"),
    ("root ::= [a", "the class does not end", "line 1, column 10"),
    ("root ::= []", "the class of characters is empty", "line 1, column 10"),
    ("root ::= [z-a]", "runs backwards", "line 1, column 10"),
    ('root ::= ("a"', "the bracket is not closed", "line 1, column 10"),
    ('root ::= "a")', "closed that was not opened", "line 1, column 13"),
    ("root ::= *", "nothing that the operator", "line 1, column 10"),
    ('root ::= "a"+?', "nothing that the operator", "line 1, column 14"),
    ('root ::= "a"{}', "a count is", "line 1, column 13"),
    ('root ::= "a"{3,2}', "counts backwards", "line 1, column 13"),
    ('root ::= (="a")', "lookahead", "line 1, column 10"),
    (r'root ::= "\q"', r"the escape \q", "line 1, column 11"),
    (r'root ::= "\xg"', "the escape is not complete", "line 1, column 11"),
    (r'root ::= "\ud800"', "is not a character", "line 1, column 11"),
    (r"root ::= [\U00110000]", "is not a character", "line 1, column 11"),
    ('root ::= "a"\nroot ::= "b"', "'root' is defined twice", "line 2, column 1"),
    ("root ::= <|end|>", "tokens by name", "line 1, column 10"),
    ("root ::= /a/", "regular expressions are not part", "line 1, column 10"),
    ('root ::= TagDispatch(("a", b))', "the macro TagDispatch", "line 1, column 10"),
    ('"a"\nroot ::= "a"', "a rule `name ::= ...` is expected", "line 1, column 1"),
]


@pytest.mark.parametrize(("text", "message", "where"), LARK_REFUSED + GBNF_REFUSED)
def test_refusals_say_what_and_where(text: str, message: str, where: str | None) -> None:
    with pytest.raises(ConstraintError) as caught:
        grammar_from_text(text, Effort())
    assert message in str(caught.value)
    assert caught.value.where == where
    assert "\n" not in str(caught.value)


LAUGHS = "start: T30\nT0: /[ab]/\n" + "\n".join(f"T{i}: T{i - 1} T{i - 1} T{i - 1}" for i in range(1, 31))
TEMPLATES = "start: t{a}\na: " + '"a"\n' + "t{x}: x t{u{x}}\nu{y}: y y"
HOSTILE = {
    "many alternatives": "start: " + " | ".join(f'"w{i}"' for i in range(20_000)),
    "many classes": "root ::= " + " ".join(["[a-z]"] * 20_000),
    "many rules": "root ::= r0\n"
    + "\n".join(f'r{i} ::= "x" r{i + 1} | "y"' for i in range(1, 20_000))
    + '\nr20000 ::= "z"',
    "many cyclic rules": "start: r0\n"
    + "\n".join(f"r{i}: r{i * 7 % 9000} r{i + 1}" for i in range(9000))
    + '\nr9000: "a"',
    "deep brackets": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "deep brackets in GBNF": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "deep arguments": "start: " + "t{" * 50_000 + '"a"' + "}" * 50_000 + "\nt{x}: x",
    "deep terminal": "start: A\nA: " + "(" * 199 + '"a"' + " /b/)*" * 199,
    "terminals that grow": LAUGHS,
    "templates that grow": TEMPLATES,
    "repetitions of repetitions": "start: " + "(" * 30 + '"a"' + ")~1000" * 30,
    "a large count": 'start: x~1000000000\nx: "a" x | "b"',
    "a large count in GBNF": "root ::= x{999999999}\nx ::= [a] x | [b]",
    "a large count in a terminal": 'start: A\nA: ("a" "b"?)~1000000',
    "exponential automaton": r"start: A" + "\n" + r"A: /(.|\n)*x.{25}/",
    "exponential automaton of rules": "root ::= [ab]* [a] [ab]{25}",
    "cyclic": "start: start",
    "cyclic pair": "start: a\na: b\nb: a",
    "only itself and more": 'start: start "a"',
    "comment signs": "root" + "#" * 100_000 + "\n",
    "backslashes": 'start: "' + "\\" * 100_001,
    "newlines": "start: \n" * 100_000,
    "slashes": "start: /" + "\\/" * 50_000,
    "NUL bytes": "\0" * 100_000,
    "schema nested deeply": "start: %json " + '{"items": ' * 30_000 + "{}" + "}" * 30_000,
    "many names": "start: " + "a " * 20_000,
}
MAY_PASS = {
    "many alternatives",
    "many classes",
    "many rules",
    "repetitions of repetitions",
    "exponential automaton of rules",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_soon(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    effort = Effort(Limits(max_seconds=0.5))
    outcome = ""
    try:
        compile_grammar(grammar_from_text(HOSTILE[name], effort), effort)
    except ConstraintError as error:
        outcome = str(error)
    assert len(outcome) < 400
    assert "\n" not in outcome
    assert time.process_time() - started < 5  # and not minutes, on a slow machine either
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 200 * 1024
    assert outcome or name in MAY_PASS


@pytest.mark.parametrize(
    ("text", "member", "other"),
    [
        ("root ::= " + "(" * 198 + '"a" root "a" | "b"' + ")*" * 198, "abbab", "ab"),
        ("start: " + "(" * 198 + '"a" start "a" | "b"' + ")*" * 198, "abbab", "ab"),
        ("start: A\nA: " + "(" * 98 + '"a" /x/' + ")*" * 98, "axax", "axa"),
        ("start: " + "[" * 198 + '"a" t{t{t{"b"}}}' + "]" * 198 + '\nt{x}: "<" x ">"', "a<<<b>>>", "a<<b>>"),
    ],
    ids=["gbnf", "lark", "terminal", "template"],
)
def test_brackets_nested_up_to_the_limit(
    text: str, member: str, other: str, grammar: Callable[[str], Callable[[str], bool]]
) -> None:
    accepts = grammar(text)
    assert accepts(member)
    assert not accepts(other)


def test_choice_is_its_options_and_nothing_else() -> None:
    options = ["yes", "no", "yes, sir", "é", "yes"]
    dfa = to_dfa(choice_expression(options, Effort()), Effort())
    candidates = [*options, "", "ye", "yes,", "noo", "yesno"]
    assert [text for text in candidates if dfa.accepts(text.encode())] == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "at least one option"),
        ("yes", "a list of strings"),
        (["a", 1], "a string (at #/1)"),
        (["a", ""], "not empty (at #/1)"),
        (["\ud800"], "surrogate"),
    ],
)
def test_choices_that_are_none(options: list[str], message: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        choice_expression(options, Effort())
    assert message in str(caught.value)


def test_a_large_choice_is_quick() -> None:
    effort = Effort()
    dfa = to_dfa(choice_expression([f"option {i * i}" for i in range(5000)], effort), effort)
    assert dfa.accepts(b"option 24990001")
    assert time.process_time() - effort.started < 1


def test_too_complex_is_told_from_malformed() -> None:
    with pytest.raises(ConstraintTooComplex):
        grammar_from_text(HOSTILE["deep brackets"], Effort())
