"""The parser against languages written out: all texts up to some length, computed from the rules by naive fixpoint.

Every beginning of a text is tried, so this covers what is accepted, what may come next and how soon a text can end.
"""

import re
from itertools import combinations_with_replacement, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    NOTHING,
    Alternation,
    CharSet,
    Concat,
    Expression,
    Literal,
    Repeat,
    concat,
    either,
    optional,
    plus,
    star,
)
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar, Production
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort

Rules = dict[str, tuple[Production, ...]]
Language = frozenset[str]


def joined(first: Language, second: Language, length: int) -> Language:
    return frozenset(a + b for a in first for b in second if len(a) + len(b) <= length)


def of_expression(expression: Expression, length: int) -> Language:
    match expression:
        case Literal(text):
            return frozenset({text} if len(text) <= length else ())
        case CharSet(ranges):
            return frozenset(chr(c) for low, high in ranges for c in range(low, high + 1) if length)
        case Concat(parts):
            texts = frozenset({""})
            for part in parts:
                texts = joined(texts, of_expression(part, length), length)
            return texts
        case Alternation(options):
            return frozenset().union(*(of_expression(option, length) for option in options))
        case Repeat(body, low, high):
            once, texts, result = of_expression(body, length), frozenset({""}), set()
            for count in range((high if high is not None else low + length) + 1):
                if count >= low:
                    result |= texts
                texts = joined(texts, once, length)
            return frozenset(result)
    raise AssertionError(expression)


def language(grammar: Grammar, length: int) -> Language:
    """All texts of at most so many characters."""
    terminals = {
        symbol: of_expression(symbol, length)
        for productions in grammar.rules.values()
        for production in productions
        for symbol in production
        if not isinstance(symbol, str)
    }
    known: dict[str, Language] = dict.fromkeys(grammar.rules, frozenset())
    changed = True
    while changed:
        changed = False
        for name, productions in grammar.rules.items():
            texts = known[name]
            for production in productions:
                derived = frozenset({""})
                for symbol in production:
                    derived = joined(
                        derived, known[symbol] if isinstance(symbol, str) else terminals[symbol], length
                    )
                texts |= derived
            changed |= texts != known[name]
            known[name] = texts
    return known[grammar.start]


def as_pattern(expression: Expression) -> str:
    """For Python's own `re`."""
    match expression:
        case Literal(text):
            return re.escape(text)
        case CharSet(ranges):
            return "[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges) + "]"
        case Concat(parts):
            return "".join(map(as_pattern, parts))
        case Alternation(options):
            return f"(?:{'|'.join(map(as_pattern, options))})" if options else "(?!)"
        case Repeat(body, low, high):
            return f"(?:{as_pattern(body)}){{{low},{'' if high is None else high}}}"
    raise AssertionError(expression)


def derives(grammar: Grammar, text: str) -> bool:
    """For texts longer than the languages that are written out: which rule spans what, by naive fixpoint."""
    size = len(text)
    terminals: dict[Expression, set[tuple[int, int]]] = {}
    spans: dict[str, set[tuple[int, int]]] = {name: set() for name in grammar.rules}

    def of_symbol(symbol: str | Expression) -> set[tuple[int, int]]:
        if isinstance(symbol, str):
            return spans[symbol]
        if symbol not in terminals:
            pattern = re.compile(as_pattern(symbol))
            every = combinations_with_replacement(range(size + 1), 2)
            terminals[symbol] = {(i, j) for i, j in every if pattern.fullmatch(text, i, j)}
        return terminals[symbol]

    changed = True
    while changed:
        changed = False
        for name, productions in grammar.rules.items():
            for production in productions:
                reached = {(i, i) for i in range(size + 1)}
                for symbol in production:
                    reached = {(i, k) for i, j in reached for j2, k in of_symbol(symbol) if j == j2}
                changed |= not reached <= spans[name]
                spans[name] |= reached
    return (0, size) in spans[grammar.start]


def check(rules: Rules, length: int, alphabet: str, max_prefix: int) -> None:
    """Texts up to `length` are written out; beginnings of up to `max_prefix` characters are tried."""
    grammar = Grammar(next(iter(rules)), rules)
    texts = language(grammar, length)
    try:
        compiled = compile_grammar(grammar, Effort())
    except ConstraintError:
        assert not texts
        return
    at_start = Parser(compiled)
    for size in range(max_prefix + 1):
        for prefix in map("".join, product(alphabet, repeat=size)):
            parser = at_start.fork()  # what was learnt of other texts must do no harm
            rest = [text[size:] for text in texts if text.startswith(prefix)]
            if not parser.advance(prefix.encode()):
                assert not rest, prefix
                continue
            completion = parser.completion().decode()
            assert parser.min_bytes() == len(completion)
            assert parser.is_complete == ("" in rest) == (completion == ""), prefix
            if rest:
                assert len(completion) == min(map(len, rest)), prefix
                assert completion in rest, prefix
            else:
                assert size + len(completion) > length
                assert derives(grammar, prefix + completion), prefix
            following = {chr(byte) for byte in parser.next_bytes()}
            assert following >= {text[0] for text in rest if text}, prefix
            assert parser.is_ended == (not following)
            for character in following:  # each can be completed: the checks above show it for this beginning
                assert parser.advance(character.encode())
                longer = prefix + character + parser.completion().decode()
                assert longer in texts if len(longer) <= length else derives(grammar, longer), prefix
                parser.rollback(1)


L = Literal
A, B = Literal("a"), Literal("b")
NUMBER = plus(CharSet.chars("1"))
WORD = plus(CharSet.chars("ab"))

GRAMMARS: dict[str, tuple[Rules, str, int, int]] = {
    "nested parentheses": ({"s": ((L("("), "s", L(")"), "s"), ())}, "()", 10, 5),
    "arithmetic, left-recursive": (
        {
            "e": (("e", L("+"), "t"), ("t",)),
            "t": (("t", L("*"), "f"), ("f",)),
            "f": ((NUMBER,), (L("("), "e", L(")"))),
        },
        "1+*()",
        8,
        4,
    ),
    "arithmetic, right-recursive": (
        {"e": (("t", L("+"), "e"), ("t",)), "t": ((NUMBER,), (L("("), "e", L(")")))},
        "1+()",
        9,
        4,
    ),
    "arithmetic, ambiguous": (
        {"e": (("e", L("+"), "e"), ("e", L("*"), "e"), (L("("), "e", L(")")), (L("1"),))},
        "1+*()",
        8,
        4,
    ),
    "ambiguous pairs": ({"s": (("s", "s"), (A,))}, "ab", 8, 7),
    "ambiguous triples": ({"s": (("s", "s", "s"), ("s", "s"), (A,), (B,))}, "ab", 7, 6),
    "palindromes": ({"s": ((A, "s", A), (B, "s", B), (A,), (B,), ())}, "ab", 10, 5),
    "even palindromes": ({"s": ((A, "s", A), (B, "s", B), ())}, "ab", 10, 5),
    "equal counts": ({"s": ((A, "s", B), ())}, "ab", 10, 5),
    "copies of nothing": (
        {"s": (("n", "n", A, "n", "n"),), "n": ((), ("m",)), "m": (("n",), (B,))},
        "ab",
        6,
        5,
    ),
    "hidden left recursion": ({"s": (("n", "s", A), (B,)), "n": ((), (L("c"),))}, "abc", 7, 5),
    "indirect left recursion": ({"s": (("t", A), (A,)), "t": (("s", B), ("t", B), (B,))}, "ab", 7, 5),
    "rules that are each other": ({"s": (("t",), (A, "s")), "t": (("s",), (B,))}, "ab", 6, 5),
    "right recursion, rest may be empty": ({"s": ((A, "s", "n"), (A,)), "n": ((), (B,))}, "ab", 7, 5),
    "list": ({"l": ((L("["), "i", L("]")),), "i": ((), (A, "t")), "t": ((), (L(","), A, "t"))}, "[a,]", 9, 6),
    "items that are lists": ({"l": ((L("["), "l", "l", L("]")), (A,))}, "[a]", 11, 5),
    "terminals that overlap": ({"s": ((WORD, A, WORD),)}, "ab", 7, 5),
    "terminals that may be empty": (
        {"s": ((star(A), optional(B), star(A)), ("s", L("c"), star(B)))},
        "abc",
        6,
        5,
    ),
    "keyword or name": ({"s": ((L("ab"), L("c"), WORD), (WORD, L("c")))}, "abc", 7, 5),
    "a start that never ends without it": ({"s": ((A, "s"), ("s", B), (A, B))}, "ab", 7, 6),
    "unproductive and unreachable rules": (
        {"s": ((A, "u"), (B,), (NOTHING,)), "u": (("u", A),), "v": ((A,),)},
        "ab",
        4,
        3,
    ),
    "only the empty text": ({"s": (("t", EPSILON),), "t": ((), ("s", "s"))}, "ab", 3, 2),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammar_by_grammar(name: str) -> None:
    rules, alphabet, length, max_prefix = GRAMMARS[name]
    check(rules, length, alphabet, max_prefix)


TERMINALS = [
    A,
    B,
    L("ab"),
    L("aba"),
    star(A),
    optional(B),
    concat(A, star(B)),
    either(A, L("bb")),
    WORD,
    EPSILON,
]
SYMBOLS = st.one_of(st.sampled_from(["r0", "r1", "r2"]), st.sampled_from(TERMINALS))
PRODUCTIONS = st.lists(st.lists(SYMBOLS, max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.tuples(PRODUCTIONS, PRODUCTIONS, PRODUCTIONS))
def test_any_grammar(productions: tuple[tuple[Production, ...], ...]) -> None:
    rules = {f"r{number}": alternatives for number, alternatives in enumerate(productions)}
    check(rules, 6, "ab", 4)
