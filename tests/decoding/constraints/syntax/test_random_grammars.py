"""Random grammars, written in Lark's language and in GBNF: both contain the short texts that Lark says they do."""

import itertools
import random
from collections.abc import Callable

import lark
import pytest

from cadenza.decoding.constraints.errors import ConstraintError

TEXTS = ["".join(t) for length in range(5) for t in itertools.product("ab", repeat=length)]
NAMES = ("x", "y", "z")


class Writer:
    """One random grammar in two languages."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.lark = self.gbnf = ""
        for name in ("root", *NAMES):
            in_lark, in_gbnf = self._options(2)
            self.lark += f"{'start' if name == 'root' else name}: {in_lark}\n"
            self.gbnf += f"{name} ::= {in_gbnf}\n"

    def _options(self, depth: int) -> tuple[str, str]:
        options = [self._sequence(depth) for _ in range(self._rng.choice([1, 1, 2, 3]))]
        return " | ".join(option[0] for option in options), " | ".join(option[1] for option in options)

    def _sequence(self, depth: int) -> tuple[str, str]:
        items = [self._repeated(depth) for _ in range(self._rng.choice([0, 1, 1, 2, 2, 3]))]
        return " ".join(item[0] for item in items), " ".join(item[1] for item in items)

    def _repeated(self, depth: int) -> tuple[str, str]:
        in_lark, in_gbnf = self._item(depth)
        low, high = sorted((self._rng.randrange(3), self._rng.randrange(1, 3)))
        operator = self._rng.choice(
            [("", ""), ("", ""), ("?", "?"), ("*", "*"), ("+", "+"), (f"~{low}..{high}", f"{{{low},{high}}}")]
        )
        return in_lark + operator[0], in_gbnf + operator[1]

    def _item(self, depth: int) -> tuple[str, str]:
        kind = self._rng.randrange(4 if depth else 3)
        if kind == 0:
            name = self._rng.choice(NAMES)
            return name, name
        if kind == 1:
            return ("/[ab]/", "[ab]")
        if kind == 2:
            text = self._rng.choice(['"a"', '"b"', '"ab"', '"ba"'])
            return text, text
        in_lark, in_gbnf = self._options(depth - 1)
        return f"({in_lark})", f"({in_gbnf})"


@pytest.mark.parametrize("seed", range(40))
def test_both_languages_contain_what_lark_says(
    seed: int, grammar: Callable[[str], Callable[[str], bool]]
) -> None:
    writer = Writer(seed)
    truth = members(writer.lark)
    for text in (writer.lark, writer.gbnf):
        if not truth and derives_nothing(text, grammar):
            continue
        accepts = grammar(text)
        assert [candidate for candidate in TEXTS if accepts(candidate)] == truth, text


def derives_nothing(text: str, grammar: Callable[[str], Callable[[str], bool]]) -> bool:
    try:
        grammar(text)
    except ConstraintError as error:
        return "no text satisfies" in str(error)
    return False


def members(text: str) -> list[str]:
    try:
        parser = lark.Lark(text, parser="earley", lexer="dynamic_complete")
    except lark.exceptions.GrammarError as error:  # two ways to nothing are one too many for Lark
        pytest.skip(str(error).splitlines()[0])
    found = []
    for candidate in TEXTS:
        try:
            parser.parse(candidate)
        except lark.exceptions.UnexpectedInput:
            continue
        found.append(candidate)
    return found
