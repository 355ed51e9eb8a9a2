"""The parser beside `lark`'s Earley parser with its dynamic lexer, on texts made from the grammars and then damaged."""

import random
from collections.abc import Iterator

import pytest
from lark import Lark
from lark.exceptions import UnexpectedInput

from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar, Production, Symbol
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort

Source = dict[str, list[str]]
"""Rules by name; in a production, words that name a rule are rules, all others are patterns."""

GRAMMARS: dict[str, Source] = {
    "arithmetic": {
        "sum": ["sum [+-] product", "product"],
        "product": ["product [*/] atom", "atom"],
        "atom": [r"[0-9]+(\.[0-9]+)?", r"\( sum \)", "- atom"],
    },
    "arithmetic, right-recursive": {
        "sum": ["product", "product [+-] sum"],
        "product": ["atom", "atom [*/] product"],
        "atom": ["[0-9]+", r"\( sum \)"],
    },
    "arithmetic, ambiguous": {"e": [r"e \+ e", r"e \* e", "[0-9]+", r"\( e \)"]},
    "parentheses": {"s": ["", r"\( s \) s"]},
    "brackets of two kinds": {"s": ["", r"\( s \) s", r"\[ s \] s"]},
    "palindromes": {"p": ["a p a", "b p b", "a", "b"]},
    "ambiguous": {"s": ["s s", "a", "ab", "b"]},
    "json": {
        "value": ["object", "array", '"[a-z]*"', "-?(0|[1-9][0-9]*)", "true", "null"],
        "object": [r"\{ \}", r"\{ pair pairs \}"],
        "pairs": ["", ", pair pairs"],
        "pair": ['"[a-z]*" : value'],
        "array": [r"\[ \]", r"\[ value values \]"],
        "values": ["", ", value values"],
    },
    "sql": {
        "select": [r"SELECT\x20 columns \x20FROM\x20 name where"],
        "where": ["", r"\x20WHERE\x20 condition"],
        "columns": [r"\*", "name", "name , columns"],
        "condition": ["predicate", r"condition \x20(AND|OR)\x20 predicate"],
        "predicate": ["name [<=>] literal", r"\( condition \)"],
        "literal": ["-?[0-9]+", "'[^'\\n]*'"],
        "name": ["[a-z_][a-z0-9_]*"],
    },
    "entity lines": {
        "lines": ["line", "lines line"],
        "line": [r"[^\t\n]+ \t tag \n"],
        "tag": ["O", "[BI]- kind"],
        "kind": ["PER", "LOC"],
    },
    "keyword or name": {"s": [r"if\x20 name \x20then\x20 s", "name = name", "name"], "name": ["[a-z]+"]},
    "greedy trap": {"s": ["[a-z]+ x tail", "[a-z]+ tail"], "tail": ["", "; s"]},
    "list with a last comma": {"list": [r"\[ items \]"], "items": ["", "a", "a , items"]},
    "lambda terms": {"t": ["[a-z]", r"\\ [a-z] \. t", r"\( t t \)", r"\( t \)"]},
    "left and right": {"s": ["a s", "s b", "c"]},
    "characters of several bytes": {"s": ["[а-яё]+ w", "😀 s"], "w": ["", "é w", "[^a] w"]},
}


def productions(source: Source) -> Iterator[tuple[str, list[list[str]]]]:
    for name, alternatives in source.items():
        yield name, [alternative.split(" ") if alternative else [] for alternative in alternatives]


def as_lark(source: Source) -> str:
    def symbol(word: str) -> str:
        return word if word in source else "/" + word.replace("/", r"\/") + "/"

    return "\n".join(
        f"{name}: " + " | ".join(" ".join(map(symbol, words)) for words in alternatives)
        for name, alternatives in productions(source)
    )


def compiled(source: Source) -> CompiledGrammar:
    def symbol(word: str) -> Symbol:
        return word if word in source else parse_regex(word, "python", Effort())

    rules: dict[str, tuple[Production, ...]] = {
        name: tuple(tuple(map(symbol, words)) for words in alternatives)
        for name, alternatives in productions(source)
    }
    return compile_grammar(Grammar(next(iter(rules)), rules), Effort())


def some_text(grammar: CompiledGrammar, rng: random.Random) -> str:
    """A random walk of some bytes, completed."""
    parser = Parser(grammar)
    text = bytearray()
    for _ in range(rng.randint(0, 16)):
        following = parser.next_bytes()
        if not following:
            break
        byte = bytes([rng.choice(following)])
        assert parser.advance(byte)
        text += byte
    text += parser.completion()
    return text.decode()


def damaged(text: str, rng: random.Random, characters: str) -> str:
    position = rng.randint(0, len(text))
    removed = rng.randint(0, 2)
    return text[:position] + rng.choice(["", "!", rng.choice(characters)]) + text[position + removed :]


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_same_texts_are_accepted(name: str) -> None:
    source = GRAMMARS[name]
    grammar = compiled(source)
    lark = Lark(as_lark(source), parser="earley", lexer="dynamic_complete", start=next(iter(source)))
    rng = random.Random(name)
    written = [some_text(grammar, rng) for _ in range(25)]
    characters = "".join(sorted({*"".join(written)}))
    texts = {*written, *(damaged(text, rng, characters) for text in written for _ in range(3))}
    verdicts = set()
    for text in sorted(texts):
        try:
            lark.parse(text)
            expected = True
        except UnexpectedInput:
            expected = False
        parser = Parser(grammar)
        assert (parser.advance(text.encode()) and parser.is_complete) == expected, text
        verdicts.add(expected)
    assert verdicts == {True, False}
