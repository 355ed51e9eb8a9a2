"""What the parser promises beside exactness: going back, forks, forced runs, readable completions, bounded work."""

import random

import pytest

from cadenza.decoding.constraints.automata.expression import (
    ANY_TEXT,
    CharSet,
    Concat,
    Literal,
    Not,
    Repeat,
    concat,
    either,
    plus,
    star,
)
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar, GrammarBuilder, Production
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort

L = Literal


def parser_of(**rules: tuple[Production, ...]) -> Parser:
    return Parser(compile_grammar(Grammar(next(iter(rules)), rules), Effort()))


def after(parser: Parser, text: str) -> Parser:
    assert parser.advance(text.encode())
    return parser


def expressions() -> Parser:
    return parser_of(
        e=(("e", L("+"), "e"), (L("("), "e", L(")")), (plus(CharSet.chars("01")),), (L("f("), "a", L(")"))),
        a=((), ("e", "m")),
        m=((), (L(","), "e", "m")),
    )


def state(parser: Parser) -> tuple[object, ...]:
    return (
        parser.num_bytes,
        parser.is_complete,
        parser.is_ended,
        parser.min_bytes(),
        parser.completion(),
        parser.next_bytes(),
        parser.forced(8),
    )


def test_going_back_and_forks_are_like_a_fresh_parser() -> None:
    rng = random.Random(3)
    texts = {expressions(): b""}
    for _ in range(600):
        parser = rng.choice(list(texts))
        action = rng.random()
        if action < 0.6:
            piece = bytes(rng.choice(b"01+(),f") for _ in range(rng.randint(1, 3)))
            if parser.advance(piece):
                texts[parser] += piece
        elif action < 0.75:
            piece = parser.completion() or b"+(1"
            assert parser.advance(piece)
            texts[parser] += piece
        elif action < 0.9:
            distance = rng.randint(0, len(texts[parser]))
            parser.rollback(distance)
            texts[parser] = texts[parser][: len(texts[parser]) - distance]
        elif len(texts) < 8:
            texts[parser.fork()] = texts[parser]
        fresh = expressions()
        assert fresh.advance(texts[parser])
        assert state(parser) == state(fresh)


def test_going_back_further_than_the_text() -> None:
    parser = after(expressions(), "1+")
    with pytest.raises(ValueError, match="cannot go back 3 bytes in a text of 2"):
        parser.rollback(3)
    assert parser.num_bytes == 2


def test_forced_runs() -> None:
    parser = parser_of(s=((L("name: "), plus(CharSet.chars("ab")), L(";")), (L("nation: é"), L("!"))))
    assert parser.forced(100) == b"na"
    assert parser.forced(1) == b"n"
    assert after(parser, "nat").forced(100) == "ion: é!".encode()
    assert parser.num_bytes == 3
    assert after(parser, "ion: é!").forced(100) == b""
    assert parser.is_ended
    assert after(expressions(), "f").forced(100) == b"("
    where_it_may_end = parser_of(s=((L("a"), "t"),), t=((), (L("bc"),)))
    assert where_it_may_end.forced(100) == b"a"
    assert after(where_it_may_end, "a").forced(100) == b""
    assert after(where_it_may_end, "b").forced(100) == b"c"


def test_completions_have_no_more_control_characters_than_they_need() -> None:
    anything = CharSet.of([(0, 0x10FFFF)])
    assert parser_of(s=((Repeat(anything, 3, None),),)).completion() == b"aaa"
    assert parser_of(s=((L("\n\n"),), (L("\n "),), (L("\n\t"),))).completion() == b"\n "
    assert (
        parser_of(s=(("a",), ("b",)), a=((L("\x00"), L("x")),), b=((L("z"), L("y")),)).completion() == b"zy"
    )
    assert parser_of(s=((concat(either(L("\t"), L("\n")), L("\x00")),),)).completion() == b"\t\x00"
    assert parser_of(s=((L("é"),), (L("\x00\x00\x00"),))).completion() == "é".encode()


def test_a_text_may_stop_inside_a_character() -> None:
    parser = parser_of(s=((plus(CharSet.chars("é€")), L(";")),))
    assert parser.advance("€".encode()[:1])
    assert parser.completion() == "€;".encode()[1:]
    assert not parser.advance(b";")


def test_an_intersection_as_a_terminal() -> None:
    letters, has_no_end = plus(CharSet.of([(97, 122)])), Not(Concat((ANY_TEXT, L("end"), ANY_TEXT)))
    parser = parser_of(s=(("w", L("end")),), w=((has_no_end,), (letters, L("!"))))
    assert after(parser, "some text, en").completion() == b"d"
    assert after(parser, "d").is_ended
    assert after(parser, "").completion() == b""
    parser.rollback(len("some text, end"))
    assert after(parser, "word!en").completion() == b"d"
    assert not parser.fork().advance(b"d!")


LONG: dict[str, tuple[dict[str, tuple[Production, ...]], str]] = {
    "right recursion": ({"s": ((L("a"),), (L("a,"), "s"))}, "a,"),
    "left recursion": ({"s": ((L("a,"),), ("s", L("a,")))}, "a,"),
    "both": ({"s": ((L("a,"),), ("s", "s"))}, "a,"),
    "triples": ({"s": ((L("a"),), (L(","),), ("s", "s"), ("s", "s", "s"))}, "a,"),
    "operators": ({"e": (("e", L("+"), "e"), ("e", L("*"), "e"), (L("x"),))}, "x*x+"),
    "operators by precedence": (
        {
            "e": (("e", L("+"), "t"), ("t",)),
            "t": (("t", L("*"), "f"), ("f",)),
            "f": ((L("x"),), (L("("), "e", L(")"))),
        },
        "x*(x+x)+",
    ),
    "mutual right recursion": ({"s": ((L("a"), "t"), ()), "t": ((L(","), "s"), ())}, "a,"),
    "an empty rule behind": ({"s": ((L("a,"), "n", "s", "n"), ()), "n": ((),)}, "a,"),
    "one long terminal": ({"s": ((L('"'), star(CharSet.chars("ab ")), L('"')),)}, ""),
    "two readings throughout": (
        {"s": ((plus(CharSet.chars("ab,")), L("!")), (plus(CharSet.chars("a,")), L("?")))},
        "a,",
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_texts_that_repeat_themselves_cost_nothing_new(name: str) -> None:
    rules, period = LONG[name]
    work = []
    for length in (100, 10_000):
        parser = Parser(compile_grammar(Grammar(next(iter(rules)), rules), Effort()))
        text = (period * length)[:length] if period else '"' + "b a" * (length // 3)
        after(parser, text).min_bytes()
        work.append(parser.num_items)
    assert work[1] == work[0] < 500


def test_a_bounded_list_costs_the_same_per_item() -> None:
    work = []
    for count in (200, 2_000):
        builder = GrammarBuilder(Effort())
        items = builder.repeat(Literal("ab"), 0, count, Literal(","))
        parser = Parser(compile_grammar(builder.build(items), Effort()))
        assert parser.advance(b"ab," * (count - 1) + b"ab")
        assert parser.is_ended
        work.append(parser.num_items)
    assert work[1] <= 10.5 * work[0]


def test_a_hopelessly_ambiguous_text_is_an_error_that_changes_nothing() -> None:
    parser = parser_of(s=((L("a"), "s", L("a")), (L("a"), "s", "n"), ()), n=((star(L("a")),),))
    with pytest.raises(MatcherError, match="too ambiguous"):
        parser.advance(b"a" * 20_000)
    assert parser.num_bytes == 0
    assert after(parser, "aaa").is_complete
