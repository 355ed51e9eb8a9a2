"""Compiling grammars: what is refused and how soon, and the prices that completions rest on."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import Concat, Expression, Literal, Repeat, either, star
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar, compile_grammar
from cadenza.decoding.constraints.grammar.components import components
from cadenza.decoding.constraints.grammar.grammar import Grammar, Production
from cadenza.decoding.constraints.grammar.terminal import BYTE, Terminal, literal_terminal, terminal_of
from cadenza.decoding.constraints.limits import Effort, Limits

Rules = dict[str, tuple[Production, ...]]
L = Literal


def compiled(rules: Rules) -> CompiledGrammar:
    return compile_grammar(Grammar(next(iter(rules)), rules), Effort())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"s": (("t",),)}, "the rule 't' is not defined"),
        ({"s": ()}, "no text satisfies the constraint"),
        ({"s": (("s", L("a")),)}, "no text satisfies the constraint"),
        ({"s": (("t", L("a")),), "t": ((either(),),)}, "no text satisfies the constraint"),
        ({"s": (("t",),), "t": (("s",),)}, "no text satisfies the constraint"),
    ],
)
def test_refused(rules: Rules, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        compiled(rules)


def test_rules_that_nothing_leads_to_may_be_anything() -> None:
    grammar = compiled({"s": ((L("a"),), ("t", "s")), "t": (("t",),), "u": (("nowhere",),)})
    assert grammar.min_bytes == 1
    assert len(grammar.openings) == 1


def nested(depth: int) -> Expression:
    expression: Expression = L("a")
    for _ in range(depth):
        expression = Concat((expression, L("b")))
    return expression


HOSTILE: dict[str, Rules] = {
    "a shortest text of 2 ** 300 bytes": {f"r{i}": ((f"r{i + 1}",) * 2,) for i in range(300)}
    | {"r300": ((L("a"),),)},
    "2 ** 300 empty texts": {f"r{i}": ((f"r{i + 1}",) * 2,) for i in range(300)} | {"r300": ((L("a"),), ())},
    "a deep expression": {"s": ((nested(5_000),),)},
    "too many productions": {"s": tuple((L("a"),) * (i % 7) + (L(str(i)),) for i in range(60_000))},
    "large automata": {
        "s": tuple(
            (Repeat(either(*map(L, "abcdefgh"[: 2 + i % 7])), 3_000, 3_100 + i),) for i in range(3_000)
        )
    },
    "levels within levels": {f"r{i}": ((f"r{i + 1}", L("x")), (f"r{i + 1}",)) for i in range(9_000)}
    | {"r9000": ((L("a"),),)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_in_time(name: str) -> None:
    started = time.process_time()
    with pytest.raises(ConstraintTooComplex):
        compiled(HOSTILE[name])
    assert time.process_time() - started < 1.8


def test_the_time_limit_holds() -> None:
    rules: Rules = {f"r{i}": ((L(f"w{i}"), f"r{i + 1}"), (f"r{i + 1}", L(","))) for i in range(20_000)}
    rules["r20000"] = ((L("end"),),)
    with pytest.raises(ConstraintTooComplex, match=r"more than 0.05 seconds"):
        compile_grammar(Grammar("r0", rules), Effort(Limits(max_seconds=0.05)))


def test_deep_grammars_need_no_recursion() -> None:
    chain: Rules = {f"r{i}": ((f"r{i + 1}", L("x")),) for i in range(3_000)}
    grammar = compiled(chain | {"r3000": ((L("a"),),)})
    assert grammar.min_bytes == 3_001


def test_equal_terminals_and_equal_rests_are_shared() -> None:
    pattern = r"[a-z]+\d"
    rules: Rules = {
        "s": tuple((L(str(i)), parse_regex(pattern, "python", Effort()), L(";")) for i in range(50)),
    }
    grammar = compiled(rules)
    assert len(grammar.terminals) == 52
    assert len(grammar.symbol) == 3 + 50 + 2  # the ends and the start, the heads, the common rest


def follows(terminal: Terminal, text: bytes) -> int:
    """The state behind the text, -1 if there is none."""
    state = 0
    for byte in text:
        if state >= 0:
            state = terminal.table[state * terminal.num_classes + terminal.byte_class[byte]]
    return state


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.text(st.sampled_from("ab\té😀\x00/"), max_size=8), st.binary(max_size=4))
def test_literals_are_compiled_alike_on_both_ways(text: str, other: bytes) -> None:
    encoded = text.encode()
    short, long = literal_terminal(encoded), terminal_of(to_dfa(L(text), Effort()), Effort())
    assert short.is_nullable == long.is_nullable == short.only_empty == long.only_empty == (text == "")
    for end in range(len(encoded) + 1):
        a, b = follows(short, encoded[:end]), follows(long, encoded[:end])
        assert short.accepting[a] == long.accepting[b] == (end == len(encoded))
        assert short.sole_byte[a] == long.sole_byte[b]
        assert short.cost[a] == long.cost[b]
        assert short.next_bytes(a) == long.next_bytes(b) == list(encoded[end : end + 1])
        assert short.cheapest(a) == long.cheapest(b) == encoded[end:]
        assert (follows(short, encoded[:end] + other) < 0) == (follows(long, encoded[:end] + other) < 0)


@pytest.mark.parametrize(
    "pattern",
    [r"\d{4}-\d{2}-\d{2}", r"(?s:.*)x.{3}", r'"([^"\\]|\\.)*"', r"[\x00-\x20]{2}|é{3}", r"(ab|a)*c|\n\n"],
)
def test_prices_of_terminals_are_shortest_paths(pattern: str) -> None:
    dfa = to_dfa(parse_regex(pattern, "python", Effort()), Effort())
    terminal = terminal_of(dfa, Effort())
    controls = {*range(0x20), 0x7F}
    cost = [0 if accepting else 1 << 60 for accepting in dfa.accepting]
    for _ in range(dfa.num_states):  # Bellman and Ford, over all bytes
        for state in range(dfa.num_states):
            for byte in range(256):
                target = dfa.next(state, byte)
                if target >= 0:
                    cost[state] = min(cost[state], cost[target] + BYTE + (byte in controls))
    assert list(terminal.cost) == cost
    assert [price // BYTE for price in terminal.cost] == dfa.distance.tolist()
    for state in range(dfa.num_states):
        text = terminal.cheapest(state)
        assert len(text) * BYTE + sum(byte in controls for byte in text) == cost[state]
        following = [byte for byte in range(256) if dfa.next(state, byte) >= 0]
        assert terminal.next_bytes(state) == following
        expected = following[0] if len(following) == 1 else -1 if following else -2
        assert terminal.sole_byte[state] == expected


def test_components() -> None:
    rng = random.Random(5)
    for _ in range(200):
        size = rng.randint(1, 8)
        targets = {node: rng.sample(range(size), rng.randint(0, min(3, size))) for node in range(size)}
        reach = {node: {node} for node in range(size)}
        for _ in range(size):
            for node in range(size):
                reach[node] |= set().union(*(reach[target] for target in targets[node]))
        groups = list(components([0], targets.__getitem__))
        assert sorted(node for group in groups for node in group) == sorted(reach[0])
        place = {node: number for number, group in enumerate(groups) for node in group}
        for a in reach[0]:
            for b in reach[0]:
                assert (place[a] == place[b]) == (b in reach[a] and a in reach[b])
            assert all(place[target] <= place[a] for target in targets[a])


def test_a_text_may_begin_behind_empty_parts() -> None:
    grammar = compiled({"s": ((star(L("a")), star(L("b")), star(L("c"))),)})
    assert grammar.min_bytes == 0
    assert len(grammar.openings[0]) == 3
