"""Patterns that would take all time or memory end as a named refusal, soon; ordinary ones are quick."""

import time
import tracemalloc

import pytest

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import (
    Alternation,
    Expression,
    Literal,
    Not,
    concat,
    star,
)
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort, Limits

HOSTILE = {
    "states that double": r"(.|\n)*x.{20}",
    "states that double, two letters": r"(0|1)*1(0|1){16}",
    "nested counts": r"((a{1,100}){1,100}){1,10}",
    "one large count": r"a{1000000}",
    "a count beyond all numbers": "a{" + "9" * 5000 + "}",
    "large count of a group": r"(?:ab|c){100000}",
    "long text": "a" * 400_000,
    "many groups": "(ab|cd)" * 40_000,
    "depth": "(" * 1000,
    "depth of repetitions": "(?:" * 150 + "a" + "b)+c" * 150,
    "optional upon optional": "(a?){3000}" * 20,
    "lookaheads, each with its own states": "".join(f"(?=.*[{c}].{{12}}$)" for c in "abcdefghij") + ".*",
    "boundaries in copies": r"(?:(?:(?:a\b){1,32}){1,32}){1,32}",
    "anchored alternatives": "(^a|b|$)?" * 99,
    "wide classes counted": r"\p{L}{1,3000}",
    "ambiguous stars": "(.*)(.*)(.*)(.*)[^x]{2000}",
    "unclosed": "[" + "a-z" * 100_000,
    "negated lookaheads inside each other": "(?!" * 150 + "a" + ")" * 150,
}
MAY_BE_ACCEPTED = {"negated lookaheads inside each other", "anchored alternatives", "depth of repetitions"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_patterns_end_as_refusals(name: str) -> None:
    effort, started = Effort(Limits(max_seconds=0.25)), time.process_time()
    try:
        to_dfa(parse_regex(HOSTILE[name], "python", effort), effort)
        accepted = True
    except ConstraintError:
        accepted = False
    assert time.process_time() - started < 1.0
    assert not accepted or name in MAY_BE_ACCEPTED


@pytest.mark.parametrize("name", ["states that double", "optional upon optional"])
def test_memory_stays_bounded(name: str) -> None:
    tracemalloc.start()
    effort = Effort()
    with pytest.raises(ConstraintTooComplex):
        to_dfa(parse_regex(HOSTILE[name], "python", effort), effort)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_complement_of_many_words_of_many_letters_is_refused() -> None:
    words = tuple(
        Literal("".join(chr(0x4E00 + (i * 7 + j * 997) % 20000) for j in range(3))) for i in range(5000)
    )
    effort = Effort(Limits(max_seconds=60))  # a slow machine takes more than it would be given
    assert to_dfa(Alternation(words), effort).accepts(words[77].text.encode())
    with pytest.raises(ConstraintTooComplex, match=r"transitions|seconds"):
        to_dfa(Not(Alternation(words)), Effort())


def test_depth_of_complements_is_limited() -> None:
    expression: Expression = Literal("a")
    for _ in range(1000):
        expression = Not(concat(expression, Literal("b")))
    with pytest.raises(ConstraintTooComplex, match="nested"):
        to_dfa(expression, Effort())
    deep: Expression = Literal("a")
    for _ in range(3000):
        deep = star(deep)
    assert to_dfa(deep, Effort()).num_states == 1


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])T\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
        r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)*\.[a-zA-Z]{2,24}",
        r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"',
        r"[a-z]{1,1000}",
        r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z]).{8,64}",
    ],
)
def test_ordinary_patterns_are_quick(pattern: str) -> None:
    """Some ten times what they take here, not to fail on a slow machine."""
    started = time.process_time()
    to_dfa(parse_regex(pattern, "python", Effort()), Effort())
    assert time.process_time() - started < 0.4
