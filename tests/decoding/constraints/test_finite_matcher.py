"""The matcher of finite constraints: ends, budgets, forks, forced runs, and the masks that threads share."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import Alternation, Literal
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.finite import FiniteAutomaton, FiniteMatcher, compile_finite
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.token_cache import MaskCache
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel, Tokenizer

PLENTY = 10**6


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> Vocabulary:
    return Vocabulary.from_tokenizer(smollm2.tokenizer, smollm2.eos_token_ids, smollm2.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedModel) -> Tokenizer:
    return smollm2.tokenizer


def compiled(pattern: str, vocabulary: Vocabulary) -> FiniteAutomaton:
    return compile_finite(to_dfa(parse_regex(pattern, "python", Effort()), Effort()), vocabulary, Effort())


def choice(vocabulary: Vocabulary, *texts: str) -> FiniteAutomaton:
    return compile_finite(to_dfa(Alternation(tuple(map(Literal, texts))), Effort()), vocabulary, Effort())


def filled(matcher: FiniteMatcher, vocabulary: Vocabulary, remaining: int) -> list[int]:
    row = np.full(vocabulary.num_words, -1, np.int32)
    matcher.fill(row, remaining)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def token(vocabulary: Vocabulary, text: bytes) -> int:
    return vocabulary.tokens.index(text)


def test_the_answer_may_end_where_the_text_is_complete() -> None:
    vocabulary = Vocabulary([b"</s>", b"yes", b", sir", b"!", b"y", b"es", b"<end>"], [0, 6])
    matcher = FiniteMatcher(choice(vocabulary, "yes", "yes, sir"), vocabulary)
    assert filled(matcher, vocabulary, PLENTY) == [1, 4]
    assert not matcher.is_complete
    with pytest.raises(MatcherError, match="not complete"):
        matcher.advance(0)
    matcher.advance(1)
    assert (matcher.is_complete, matcher.is_ended) == (True, False)
    assert filled(matcher, vocabulary, PLENTY) == [0, 2, 6]
    ended = matcher.fork()
    assert ended.accept(6, 3) == 6
    assert (ended.is_complete, ended.is_ended, ended.min_tokens, ended.completion()) == (True, True, 0, [])
    assert ended.forced(9) == []
    for after_the_end in (
        lambda: ended.advance(0),
        lambda: ended.advance(1),
        lambda: filled(ended, vocabulary, 5),
    ):
        with pytest.raises(MatcherError):
            after_the_end()
    assert filled(matcher, vocabulary, PLENTY) == [0, 2, 6]
    matcher.advance(2)
    assert (matcher.is_complete, matcher.is_ended) == (True, True)
    assert filled(matcher, vocabulary, PLENTY) == [0, 6]


def test_tokens_that_do_not_fit_are_refused() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"", b"ab", b"</s>"], [4])
    matcher = FiniteMatcher(compiled("ab?", vocabulary), vocabulary)
    for wrong in (1, 2, 5, -1, 10**9):
        with pytest.raises(MatcherError):
            matcher.advance(wrong)
    matcher.advance(0)
    with pytest.raises(MatcherError, match="token 0"):
        matcher.advance(0)
    assert filled(matcher, vocabulary, 1) == [1, 4]  # still of use


def test_budgets_take_only_what_cannot_be_completed() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"c", b"bc", b"</s>"], [4])
    matcher = FiniteMatcher(compiled("a|bca|bcab", vocabulary), vocabulary)
    assert filled(matcher, vocabulary, 3) == [0, 1, 3]
    assert filled(matcher, vocabulary, 2) == [0, 3]
    assert filled(matcher, vocabulary, 1) == [0]
    with pytest.raises(MatcherError, match="1 tokens are needed"):
        filled(matcher, vocabulary, 0)
    plenty, exact, short = matcher.fork(), matcher.fork(), matcher.fork()
    assert plenty.accept(3, 3) == 3
    assert not plenty.limited
    assert exact.accept(3, 2) == 3
    assert exact.limited
    assert exact.fork().limited
    assert short.accept(1, 2) == 0  # that would not end in time
    assert short.limited
    assert short.is_complete
    assert not matcher.limited, "the others' budgets are nothing to it"


def test_forks_go_their_own_ways() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"ba", b"</s>"], [4])
    matcher = FiniteMatcher(compiled(r"(ab|ba)+", vocabulary), vocabulary)
    start = matcher.fork()
    matcher.advance(token(vocabulary, b"a"))
    other = matcher.fork()
    matcher.advance(token(vocabulary, b"b"))
    assert (matcher.is_complete, other.is_complete) == (True, False)
    start.advance(token(vocabulary, b"b"))
    assert not start.is_complete
    other.advance(token(vocabulary, b"ba"))
    assert not other.is_complete
    other.advance(token(vocabulary, b"b"))
    assert other.is_complete


def test_rows_wider_than_the_vocabulary_allow_nothing_there() -> None:
    vocabulary = Vocabulary([b"a", b"b"], [])
    row = np.full(4, -1, np.int32)
    FiniteMatcher(compiled("a", vocabulary), vocabulary).fill(row, 1)
    assert row.tolist() == [1, 0, 0, 0]


def test_the_highest_bit_of_a_word() -> None:
    vocabulary = Vocabulary([b"b"] * 31 + [b"a"] + [b"b"] * 33 + [b"a", b""], [66])
    matcher = FiniteMatcher(compiled("a?", vocabulary), vocabulary)
    row = np.zeros(3, np.int32)
    matcher.fill(row, 5)
    assert row.tolist() == [-(2**31), 0, 0b110]


def test_forced_runs_are_the_models_own_tokens(real: Vocabulary, tokenizer: Tokenizer) -> None:
    pattern = r'\{"first_name": "[A-Z][a-z]+", "is_a_citizen": (true|false)\}'
    automaton = compiled(pattern, real)
    matcher = FiniteMatcher(automaton, real, tokenizer.encode_bytes)
    forced = matcher.forced(PLENTY)
    text = b"".join(real.tokens[token_id] for token_id in forced)
    assert b'{"first_name": "'.startswith(text)
    assert len(text) >= len('{"first_name":')
    whole = tokenizer.encode('{"first_name": "Ada", "is_a_citizen": true}', add_special_tokens=False)
    assert whole[: len(forced)] == forced
    assert matcher.forced(PLENTY) == []
    rest = b'{"first_name": "'.removeprefix(text)
    for piece in ([rest] if rest else []) + [b"A", b"da", b'",']:
        matcher.advance(token(real, piece))
    forced = matcher.forced(PLENTY)
    assert b' "is_a_citizen":'.startswith(b"".join(real.tokens[token_id] for token_id in forced))
    assert forced == tokenizer.encode(' "is_a_citizen":', add_special_tokens=False)[: len(forced)]
    assert len(forced) >= 4


def test_forced_runs_end_with_the_text(real: Vocabulary, tokenizer: Tokenizer) -> None:
    for text in ("Yes, certainly.", "żółw 🐢 x", "a" * 40, "<|im_end|> is text"):
        matcher = FiniteMatcher(choice(real, text), real, tokenizer.encode_bytes)
        forced = matcher.forced(PLENTY)
        assert b"".join(real.tokens[token_id] for token_id in forced) == text.encode()
        assert matcher.is_ended
        if "<|" not in text:
            assert forced == tokenizer.encode(text, add_special_tokens=False)


def test_forced_runs_stop_where_there_is_a_choice() -> None:
    vocabulary = Vocabulary([bytes([byte]) for byte in range(128)] + [b"ab", b"abc", b"bcd"], [0])
    spell = vocabulary.segment

    def forced(pattern: str, remaining: int = PLENTY) -> bytes:
        matcher = FiniteMatcher(compiled(pattern, vocabulary), vocabulary, spell)
        return b"".join(vocabulary.tokens[token_id] for token_id in matcher.forced(remaining))

    assert forced("xyz") == b"xyz"
    assert forced("xy[0-9]") == b"xy"
    assert forced("xy(z|$)") == b"xy"
    assert forced("x?y") == b""
    assert forced("") == b""
    assert forced("ab(c|d)") == b""  # abc and bcd may be what the model would write
    assert forced("ab(x|y)") == b"ab"
    assert forced("xab(c|d)") == b"x"
    assert forced("xyz", 3) == b"xyz"
    assert forced("q{600}r").startswith(b"q" * 500)


def test_forced_runs_keep_within_the_budget() -> None:
    """The model's own spelling may need more tokens than there are; the shortest one has fewer."""
    vocabulary = Vocabulary([b"a", b"b", b"c", b"abc", b"x", b"y"], [])
    matcher = FiniteMatcher(compiled("abc(x|y)", vocabulary), vocabulary, lambda text: [0, 1, 2])
    assert matcher.fork().forced(4) == [0, 1, 2]
    assert matcher.fork().forced(3) == []
    assert matcher.forced(2) == []
    assert filled(matcher, vocabulary, 2) == [3]


def test_masks_from_many_threads(real: Vocabulary) -> None:
    automaton = compiled(r"[a-z]{1,30}@[a-z]{1,30}\.(com|org)", real)
    expected = [
        automaton._packed(automaton._allowed(state, 5), False) for state in range(automaton.dfa.num_states)
    ]

    def work(seed: int) -> bool:
        rng = random.Random(seed)
        for _ in range(100):
            state = rng.randrange(automaton.dfa.num_states)
            if automaton.dfa.accepting[state]:
                continue
            if not (automaton.mask(state, 5) == expected[state]).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_the_cache_of_masks_is_bounded() -> None:
    cache = MaskCache(max_bytes=1000)
    made: list[int] = []

    def make(key: int) -> NDArray[np.int32]:
        made.append(key)
        return np.full(25, key, np.int32)

    for key in range(30):
        assert cache.get(key, lambda key=key: make(key))[0] == key
        assert cache.get(0, lambda: make(0))[0] == 0
        assert len(cache) <= 10
    assert made == list(range(30))  # the one in use stayed
    cache.get(1, lambda: make(1))
    assert made[-1] == 1
