"""Our reading of Lark grammars against Lark's own: the same texts are in the language.

Texts are samples, mutations of them, and random walks through our parser; the truth is Lark's Earley parser with
its complete dynamic lexer.
"""

import random
import tomllib
from pathlib import Path

import lark
import pytest

from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax import grammar_from_text

GRAMMARS = {
    grammar["name"]: (grammar["text"], grammar["samples"])
    for grammar in tomllib.loads((Path(__file__).parent / "lark_grammars.toml").read_text("utf-8"))["grammar"]
}


def compiled(text: str) -> CompiledGrammar:
    return compile_grammar(grammar_from_text(text, Effort()), Effort())


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    parser = Parser(grammar)
    return parser.advance(text.encode()) and parser.is_complete


def lark_accepts(parser: lark.Lark, text: str) -> bool:
    try:
        parser.parse(text)
    except lark.exceptions.UnexpectedInput:
        return False
    return True


def mutated(text: str, alphabet: str, rng: random.Random) -> str:
    characters = list(text)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(characters) + 1)
        match rng.randrange(4):
            case 0:
                characters.insert(place, rng.choice(alphabet))
            case 1 if characters:
                del characters[place - 1]
            case 2 if characters:
                characters[place - 1] = rng.choice(alphabet)
            case 3 if characters:
                characters.insert(place, characters[place - 1])
    return "".join(characters)


def walked(grammar: CompiledGrammar, steps: int, rng: random.Random) -> str:
    """A text of the language: random bytes that may come next, then the shortest way to the end."""
    parser = Parser(grammar)
    text = bytearray()
    for _ in range(steps):
        following = sorted(parser.next_bytes())
        printable = [byte for byte in following if 32 <= byte < 127 or byte == 10]
        if not following:
            break
        byte = rng.choice(printable or following)
        text.append(byte)
        assert parser.advance(bytes([byte]))
    return (bytes(text) + parser.completion()).decode()


@pytest.mark.parametrize("name", GRAMMARS)
def test_same_language_as_lark(name: str) -> None:
    source, samples = GRAMMARS[name]
    ours = compiled(source)
    truth = lark.Lark(source, parser="earley", lexer="dynamic_complete", ambiguity="resolve")
    rng = random.Random(name)
    alphabet = "".join(sorted(set("".join(samples)))) + "a1 \n"
    texts = [*samples, *(mutated(rng.choice(samples), alphabet, rng) for _ in range(40))]
    texts += [walked(ours, rng.randrange(12), rng) for _ in range(12)]
    verdicts = {text: lark_accepts(truth, text) for text in dict.fromkeys(texts)}
    assert {text: accepts(ours, text) for text in verdicts} == verdicts
    assert any(verdicts.values())
    assert not all(verdicts.values())
