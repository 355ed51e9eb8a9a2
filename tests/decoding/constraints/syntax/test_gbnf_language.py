"""Our reading of GBNF against the same languages written for Lark, with Lark's own parser as the truth."""

import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import lark
import pytest

GRAMMARS = tomllib.loads((Path(__file__).parent / "gbnf_grammars.toml").read_text("utf-8"))["grammar"]


@pytest.mark.parametrize("case", GRAMMARS, ids=lambda case: case["name"])
def test_same_language_as_its_translation(
    case: dict[str, str], grammar: Callable[[str], Callable[[str], bool]]
) -> None:
    ours = grammar(case["text"])
    truth = lark.Lark(case["lark"], parser="earley", lexer="dynamic_complete", ambiguity="resolve")
    rng = random.Random(case["name"])
    verdicts: dict[str, bool] = {}
    for _ in range(60):
        text = rng.choice(case["samples"])
        alphabet = "".join(case["samples"])
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(["", rng.choice(alphabet)]) + text[place + rng.randrange(2) :]
        verdicts[text] = _accepts(truth, text)
    verdicts |= {text: _accepts(truth, text) for text in case["samples"]}
    assert {text: ours(text) for text in verdicts} == verdicts
    assert set(verdicts.values()) == {True, False}


def _accepts(parser: lark.Lark, text: str) -> bool:
    try:
        parser.parse(text)
    except lark.exceptions.UnexpectedInput:
        return False
    return True
