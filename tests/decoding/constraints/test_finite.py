"""Finite constraints over tokens: distances, masks and budgets against plain search with dictionaries."""

import pickle
import random
import re
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cadenza.decoding.constraints import token_groups
from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.finite import FiniteAutomaton, FiniteMatcher, compile_finite
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel

PLENTY = 10**6
REGEXES = [
    r"[a-z]{1,30}",
    r"(ab|ba)*",
    r"a*b?c{2,}",
    r"\d{4}-\d{2}-\d{2}",
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)",
    r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}",
    r"[a-z]+(\.[a-z]+)*@([a-z]+\.)+(com|org|net)",
    r"https?://[a-z]+(\.[a-z]+)+(/[a-z0-9_-]*)*",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)",
    r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}",
    r"#[0-9a-fA-F]{6}",
    r"\+?1?[ -]?\(?\d{3}\)?[ -]?\d{3}-\d{4}",
    r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?",
    r"[+-]?\d{1,3}(,\d{3})*(\.\d\d)?",
    r"yes|no|maybe",
    r"yes|yes, sir|yes, sir!",
    r"New|New York|New York City|Newark",
    r"(red|green|blue)( (red|green|blue)){2}",
    r"\"[^\"\\]{0,20}\"",
    r"\"([^\"\\\n]|\\[\"\\nt])*\"",
    r".{0,40}",
    r".+",
    r"(.|\n){3,10}",
    r"[^a-z]{1,8}",
    r"\s*\w+\s*",
    r"(\w+ ){0,5}\w+\.",
    r"([A-Z][a-z]+ ){1,3}[A-Z][a-z]+",
    r"[äöüß]{2,6}",
    r"żółw( 🐢)+",
    r"[一-龥]{1,4}",
    r"[\u0400-\u04ff ]{3,12}",
    r"[😀-😿]{1,3}",
    r"(?i)select [a-z]+ from [a-z]+( where [a-z]+ = \d+)?",
    r"SELECT (\*|[a-z]+(, [a-z]+)*) FROM [a-z]+;",
    r"\{\"name\": \"[a-z]+\", \"age\": \d{1,3}\}",
    r"\{\"first_name\": \"[A-Za-z ]+\", \"last_name\": \"[A-Za-z ]+\", \"ok\": (true|false)\}",
    r"\[(\d+(, \d+)*)?\]",
    r"(a|b)*a(a|b){4}",
    r"(0|1)*1(0|1){3}",
    r"(aa|aaa)+",
    r"((a{1,3}){1,3}){1,3}",
    r"a{17}",
    r"(?:abc){10}",
    r"(?!no)[a-z]{2,5}",
    r"(?=.*\d)[a-z0-9]{3,6}",
    r"\b[a-z]+\b( \b[a-z]+\b)?",
    r"^start.*end$",
    r"Answer: (A|B|C|D)",
    r"Answer: .{1,30}\. Confidence: (low|medium|high)",
    r"def [a-z_][a-z0-9_]*\(([a-z]+(, [a-z]+)*)?\):",
    r"<(b|i)>[a-z ]*</(b|i)>",
    r"[A-Z]{2}\d{2} ?(\d{4} ?){3,4}",
    r"([a-z]+=[a-z0-9]+&?)+",
    r"/([a-z]+/)*[a-z]+\.(py|rs|txt)",
    r"v?\d+\.\d+\.\d+(-(alpha|beta|rc)\.\d+)?",
    r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d{2} (Jan|Feb|Mar) \d{4}",
    r"- [a-z ]{1,20}(\n- [a-z ]{1,20}){2,4}",
    r"",
    r"(|a)",
]


def dfa_of(pattern: str) -> DFA:
    return to_dfa(parse_regex(pattern, "python", Effort()), Effort())


def compiled(pattern: str, vocabulary: Vocabulary) -> FiniteAutomaton:
    return compile_finite(dfa_of(pattern), vocabulary, Effort())


def matches(pattern: str, text: bytes) -> bool:
    return re.fullmatch(pattern, text.decode()) is not None


class Plain:
    """The automaton over tokens by the definition: one dictionary per state, one step per byte."""

    def __init__(self, dfa: DFA, vocabulary: Vocabulary) -> None:
        next_state = dfa.table[:, dfa.byte_class].tolist()
        self.edges: list[dict[int, int]] = []
        for state in range(dfa.num_states):
            edges = {}
            for token_id, token in enumerate(vocabulary.tokens):
                here = state if token else -1
                for byte in token:
                    here = next_state[here][byte]
                    if here < 0:
                        break
                if here >= 0:
                    edges[token_id] = here
            self.edges.append(edges)
        self.distance = [0 if accepts else PLENTY for accepts in dfa.accepting.tolist()]
        changed = True
        while changed:
            changed = False
            for state, edges in enumerate(self.edges):
                best = min((self.distance[target] + 1 for target in edges.values()), default=PLENTY)
                if best < self.distance[state]:
                    self.distance[state], changed = best, True

    def allowed(self, state: int, budget: int) -> set[int]:
        return {
            token_id
            for token_id, target in self.edges[state].items()
            if self.distance[target] <= min(budget, PLENTY - 1)
        }


def ids_in(row: NDArray[np.int32]) -> list[int]:
    return [  # bit t & 31 of word t >> 5
        32 * word + bit for word, value in enumerate(row.tolist()) for bit in range(32) if value & (1 << bit)
    ]


def filled(matcher: FiniteMatcher, vocabulary: Vocabulary, remaining: int) -> list[int]:
    row = np.full(vocabulary.num_words, -1, np.int32)
    matcher.fill(row, remaining)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def small_vocabulary(seed: int, *, missing: Iterable[int] = ()) -> Vocabulary:
    """Most bytes, pieces of several, halves of characters, spellings that occur twice, and the end at 5."""
    rng = random.Random(seed)
    gone = set(missing)
    tokens = [bytes([byte]) for byte in range(256) if byte not in gone]
    pieces = [
        *(
            b"a b c ab ba aa aaa 0 1 00 01 12 20 -0 :0 yes no may be New York sir , . .c com @ // http".split()
        ),
        *(
            text.encode()
            for text in ("ä", "öü", "🐢", " 🐢", "żół", "一", "Пр", '"', '": "', '{"', "\n- ", " ")
        ),
        "ä".encode()[:1] + b"a",
        b"x" + "🐢".encode()[:2],
        "🐢".encode()[1:],
        "ä".encode()[1:] + b"b",
    ]
    for _ in range(150):
        pieces.append(b"".join(rng.choices(pieces, k=rng.randrange(1, 4)))[: rng.randrange(1, 9)])
    tokens += [piece for piece in pieces if not gone & set(piece)]
    tokens += rng.choices(tokens, k=20) + [b""] * 3
    rng.shuffle(tokens)
    tokens.insert(5, b"")
    return Vocabulary(tokens, [5])


@cache
def shared_small() -> Vocabulary:
    return small_vocabulary(0)


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> Vocabulary:
    return Vocabulary.from_tokenizer(smollm2.tokenizer, smollm2.eos_token_ids, smollm2.tokenizer.vocab_size)


@pytest.mark.parametrize("pattern", [pattern for pattern in REGEXES if dfa_of(pattern).num_states < 130])
def test_distances_and_masks_are_those_of_plain_search(pattern: str) -> None:
    vocabulary, dfa = shared_small(), dfa_of(pattern)
    automaton, plain = compile_finite(dfa, vocabulary, Effort()), Plain(dfa, vocabulary)
    assert automaton.distance.tolist() == [PLENTY if d < 0 else d for d in plain.distance]
    for state in range(dfa.num_states):
        targets = [plain.distance[target] for target in plain.edges[state].values()]
        assert automaton.farthest[state] == max(targets, default=-1)
        ends = set(vocabulary.eos_ids) if dfa.accepting[state] else set()
        for budget in {plain.distance[state], *targets[:2], PLENTY}:
            assert set(ids_in(automaton.mask(state, budget))) == plain.allowed(state, budget) | ends


@pytest.mark.parametrize("seed", range(1, 6))
def test_states_that_no_tokens_complete_are_never_entered(seed: int) -> None:
    """The vocabulary lacks bytes, so that some prefixes of legal texts are dead ends."""
    rng = random.Random(seed)
    missing = rng.sample([byte for byte in range(256) if byte not in b"ab01"], 140)
    vocabulary = small_vocabulary(seed, missing=missing)
    dead = 0
    for pattern in [
        r"[a-z]{1,8}",
        r".{0,4}",
        r"(a|z)(b|y)|(cx){2}",
        r"[äöa]{1,3}",
        r"(a🐢|b|0-1)+",
        r"\d\d?",
    ]:
        dfa = dfa_of(pattern)
        plain = Plain(dfa, vocabulary)
        automaton = compile_finite(dfa, vocabulary, Effort())
        assert automaton.distance.tolist() == [-1 if d == PLENTY else d for d in plain.distance]
        dead += plain.distance.count(PLENTY)
        for state in range(dfa.num_states):
            for budget in (1, 3, PLENTY):
                ends = set(vocabulary.eos_ids) if dfa.accepting[state] else set()
                assert set(ids_in(automaton.mask(state, budget))) == plain.allowed(state, budget) | ends
    assert dead > 0


def test_a_language_that_the_tokens_cannot_spell_is_refused() -> None:
    vocabulary = small_vocabulary(0, missing=b"z")
    with pytest.raises(ConstraintError, match="cannot spell"):
        compile_finite(dfa_of("xyz|a+z"), vocabulary, Effort())
    with pytest.raises(ConstraintError, match="no text"):
        compile_finite(dfa_of("a(?!b)b"), vocabulary, Effort())


@pytest.mark.parametrize(
    "pattern",
    [r"\d{4}-\d{2}-\d{2}", r"yes|yes, sir|no", r"(ab|ba)*", r"[äöü]{1,2}", r'"[^"\\]{0,2}"', r"a*b"],
)
def test_the_real_vocabulary_too(pattern: str, real: Vocabulary) -> None:
    dfa = dfa_of(pattern)
    automaton, plain = compile_finite(dfa, real, Effort()), Plain(dfa, real)
    assert automaton.distance.tolist() == plain.distance
    for state in range(dfa.num_states):
        ends = set(real.eos_ids) if dfa.accepting[state] else set()
        for budget in (plain.distance[state], plain.distance[state] + 1, PLENTY):
            assert set(ids_in(automaton.mask(state, budget))) == plain.allowed(state, budget) | ends


def sample(
    automaton: FiniteAutomaton, vocabulary: Vocabulary, budget: int, rng: random.Random, *, jump: bool = False
) -> tuple[bytes, FiniteMatcher]:
    """Any allowed token at every step; the end only where there is nothing else."""
    matcher = FiniteMatcher(automaton, vocabulary)
    text = b""
    while budget and not matcher.is_ended:
        forced = matcher.forced(budget) if jump else []
        assert len(forced) <= budget
        text += b"".join(vocabulary.tokens[token_id] for token_id in forced)
        budget -= len(forced)
        if forced:
            continue
        allowed = [
            token_id for token_id in filled(matcher, vocabulary, budget) if token_id not in vocabulary.eos_ids
        ]
        if not allowed:
            break
        token_id = rng.choice(allowed)
        assert matcher.accept(token_id, budget) == token_id
        text += vocabulary.tokens[token_id]
        budget -= 1
    return text, matcher


@pytest.mark.parametrize("pattern", REGEXES)
def test_every_budget_ends_complete(pattern: str, real: Vocabulary) -> None:
    assert len(REGEXES) >= 60
    automaton = pickle.loads(pickle.dumps(compiled(pattern, real)))
    least = int(automaton.distance[0])
    rng = random.Random(pattern)
    for budget in {least, least + 1, least + 3, max(8, least), max(24, least)}:
        text, matcher = sample(automaton, real, budget, rng, jump=budget % 2 == 1)
        assert matcher.is_complete
        assert matches(pattern, text), text


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_small_vocabulary_ends_complete(pattern: str) -> None:
    vocabulary = shared_small()
    automaton = compiled(pattern, vocabulary)
    least = int(automaton.distance[0])
    rng = random.Random(pattern)
    for budget in (least, least + 1, least + 2, least + 9):
        text, matcher = sample(automaton, vocabulary, budget, rng)
        assert matcher.is_complete
        assert matches(pattern, text), text


@st.composite
def patterns(draw: Any) -> str:
    atom = st.sampled_from(["a", "b", "ab", "[a-c]", "[^a]", "é", ".", "0", r"\d"])
    return draw(
        st.recursive(
            atom,
            lambda inner: st.one_of(
                st.tuples(inner, inner).map("".join),
                st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
                st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(
                    lambda pair: f"({pair[0]}){pair[1]}"
                ),
            ),
            max_leaves=6,
        )
    )


@settings(derandomize=True, max_examples=120, deadline=None, database=None)
@given(patterns(), st.integers(0, 6), st.randoms(use_true_random=False))
def test_any_pattern_ends_complete(pattern: str, spare: int, rng: random.Random) -> None:
    vocabulary = shared_small()
    automaton = compiled(pattern, vocabulary)
    text, matcher = sample(automaton, vocabulary, int(automaton.distance[0]) + spare, rng)
    assert matcher.is_complete
    assert matches(pattern, text), text


@pytest.mark.parametrize("pattern", REGEXES[::4])
def test_completions_are_shortest_from_anywhere(pattern: str) -> None:
    vocabulary = shared_small()
    automaton = compiled(pattern, vocabulary)
    rng = random.Random(pattern)
    for steps in range(6):
        matcher, text = FiniteMatcher(automaton, vocabulary), b""
        for _ in range(steps):
            allowed = [i for i in filled(matcher, vocabulary, PLENTY) if i not in vocabulary.eos_ids]
            if allowed:
                matcher.advance(token_id := rng.choice(allowed))
                text += vocabulary.tokens[token_id]
        rest = matcher.completion()
        assert len(rest) == matcher.min_tokens
        for token_id in rest:
            matcher.advance(token_id)
            text += vocabulary.tokens[token_id]
        assert matcher.is_complete
        assert matcher.min_tokens == 0
        assert matches(pattern, text)


@pytest.mark.parametrize("pattern", [r".{0,6}", r"(ab|ba|cab)*", r"\d{4}-\d{2}", r"yes|yes, sir"])
def test_groups_are_tokens_that_lead_to_the_same_states(pattern: str) -> None:
    vocabulary, dfa = shared_small(), dfa_of(pattern)
    automaton, plain = compile_finite(dfa, vocabulary, Effort()), Plain(dfa, vocabulary)
    by_function: dict[tuple[int, ...], set[int]] = {}
    for token_id in range(vocabulary.size):
        function = tuple(edges.get(token_id, -1) for edges in plain.edges)
        by_function.setdefault(function, set()).add(int(automaton.group_of_token[token_id]))
    assert all(len(groups) == 1 for groups in by_function.values())
    assert len(by_function) == automaton.num_groups == len(set(automaton.group_of_token.tolist()))
    assert by_function[(-1,) * dfa.num_states] == {0}


def test_following_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, dfa = shared_small(), dfa_of(r"[a-z ]{1,20}|(.|\n){3}")
    whole = compile_finite(dfa, vocabulary, Effort())
    monkeypatch.setattr(token_groups, "_PAIRS_AT_ONCE", 70)
    pieces = compile_finite(dfa, vocabulary, Effort())
    assert (pieces.distance == whole.distance).all()
    assert (pieces.group_of_token == whole.group_of_token).all()
    for state in range(dfa.num_states):
        assert (pieces.mask(state, 2) == whole.mask(state, 2)).all()


@pytest.mark.parametrize(
    ("pattern", "limits"),
    [(r"[a-z]{1,300}", Limits(max_states=200)), (r"(.|\n){0,300}", Limits(max_seconds=0.0))],
)
def test_limits_are_kept(pattern: str, limits: Limits, real: Vocabulary) -> None:
    with pytest.raises(ConstraintTooComplex):
        compile_finite(dfa_of(pattern), real, Effort(limits))


@pytest.mark.parametrize(("num_states", "num_classes"), [(40_000, 2), (2_000, 20), (40_000, 256), (300, 256)])
def test_dense_automata_are_refused(num_states: int, num_classes: int, real: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, num_states, (num_states, num_classes)).astype(np.int32)
    byte_class = (np.arange(256) % num_classes).astype(np.uint8)
    before = time.process_time()
    with pytest.raises(ConstraintTooComplex):
        compile_finite(DFA(byte_class, table, rng.random(num_states) < 0.01), real, Effort())
    assert time.process_time() - before < 1.5


@pytest.mark.parametrize(
    ("pattern", "seconds"), [(r"[a-z]{1,1000}", 1.5), (r"\d{4}-\d{2}-\d{2}", 0.3), (r".{0,200}", 0.5)]
)
def test_compiling_is_quick(pattern: str, seconds: float, real: Vocabulary) -> None:
    dfa = dfa_of(pattern)
    compile_finite(dfa, real, Effort(Limits(max_seconds=seconds)))
