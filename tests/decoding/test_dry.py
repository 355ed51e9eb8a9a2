"""DRY against its definition, followed literally in quadratic time, and its breakers against the whole vocabulary."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from cadenza.decoding.dry import Breakers, Dry, find_breakers, repeats
from cadenza.models import LoadedModel

NONE = Breakers()


def by_definition(dry: Dry, context: Sequence[int]) -> dict[int, float]:
    """For every earlier place of every token: how long is the text before it the same as at the end?"""
    window = (
        list(context) if dry.last_n == -1 else list(context)[len(context) - min(dry.last_n, len(context)) :]
    )
    limit = usable_length(window, dry.breakers)
    if len(window) <= dry.allowed_length or limit < dry.allowed_length:
        return {}
    found: dict[int, float] = {}
    for place in range(1, len(window)):
        length = max(
            n for n in range(min(place, limit) + 1) if window[place - n : place] == window[len(window) - n :]
        )
        if length >= dry.allowed_length and window[place] not in dry.breakers.whole:
            penalty = min(dry.multiplier * dry.base ** (length - dry.allowed_length), 1e30)
            found[window[place]] = max(found.get(window[place], 0.0), penalty)
    return found


def usable_length(window: list[int], breakers: Breakers) -> int:
    """What follows the last token that begins a breaker, and the longest breaker that it begins."""
    for start in range(len(window) - 1, -1, -1):
        ends = [start + 1] if window[start] in breakers.whole else []
        for tail in breakers.begun.get(window[start], ()):
            if tuple(window[start + 1 : start + 1 + len(tail)]) == tail:
                ends.append(start + 1 + len(tail))
        if ends:
            return len(window) - max(ends)
    return len(window)


def contexts() -> list[list[int]]:
    rng = random.Random(7)
    kinds = [
        [rng.randrange(size) for _ in range(rng.randrange(90))] for size in (2, 3, 5, 20) for _ in range(25)
    ]
    phrase = [rng.randrange(9) for _ in range(11)]
    return [*kinds, [4] * 80, [1, 2] * 45, phrase * 9, [*phrase * 5, 3, *phrase * 4], phrase + phrase[:6]]


BREAKERS = [
    NONE,
    Breakers(frozenset({1}), {}),
    Breakers(frozenset(), {2: [(1,), (1, 0)], 0: [(2, 2)]}),
    Breakers(frozenset({4}), {4: [(1, 2)], 3: [(0,)]}),
]


@pytest.mark.parametrize("breakers", BREAKERS)
@pytest.mark.parametrize(("allowed_length", "last_n"), [(1, -1), (2, -1), (2, 30), (5, 64), (3, 2)])
def test_penalties_are_those_of_the_definition(allowed_length: int, last_n: int, breakers: Breakers):
    dry = Dry(0.8, 1.75, allowed_length, last_n, breakers)
    assert any(dry.penalties(context) for context in contexts()) or last_n == 2
    for context in contexts():
        assert dry.penalties(context) == pytest.approx(by_definition(dry, context))


def test_an_example():
    """`a b c` stands at the end and at the beginning: c would make it four; b follows a single c, which is allowed."""
    a, b, c, y = range(4)
    dry = Dry(1.0, 2.0, 2, -1, NONE)
    assert dry.penalties([a, b, c, c, b, c, y, a, b, c]) == {c: 2.0, y: 1.0}
    assert dry.penalties([a, b, c, c]) == {}
    assert Dry(1.0, 2.0, 2, 0, NONE).penalties([a, a, a, a, a]) == {}


def test_no_penalty_is_infinite():
    """An infinite one would forbid a token, which may be the only one that a constraint allows."""
    assert Dry(1e300, 1e300, 1, -1, NONE).penalties([5] * 50) == {5: 1e30}
    assert Dry(3.0, 1.0, 1, -1, NONE).penalties([5] * 50) == {5: 3.0}


class Counted(int):
    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return int.__eq__(self, other)  # type: ignore[arg-type]

    __hash__ = int.__hash__


@pytest.mark.parametrize("period", [1, 2, 7, 500])
def test_time_is_linear_where_all_is_repetition(period: int):
    """A quadratic search would compare millions of times."""
    tokens = [Counted(place % period) for place in range(4000)]
    Counted.comparisons = 0
    found = dict(repeats(tokens, len(tokens)))
    assert Counted.comparisons < 12 * len(tokens)
    assert found[len(tokens) - 1 - period] == len(tokens) - period


# breakers


def test_tokens_that_hold_a_breaker(smollm2: LoadedModel):
    tokenizer = smollm2.tokenizer
    texts = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    breakers = find_breakers(tokenizer, ("\n", "ing", "é"))
    wanted = {n for n, text in enumerate(texts) if b"\n" in text or b"ing" in text or "é".encode() in text}
    assert breakers.whole == wanted
    for token_id, tails in breakers.begun.items():
        ends = {texts[token_id] + b"".join(texts[token] for token in tail) for tail in tails}
        assert all(end.endswith((b"ing", "é".encode())) for end in ends)
    for n, text in enumerate(texts):
        begins = any(text.endswith(part) for part in (b"i", b"in")) and b"ing" not in text
        assert not begins or n in breakers.begun


@pytest.mark.parametrize("text", ["User:", "###", "\n\nAssistant", "。」", "naïve", "<|im_end|>", "🙂🙂"])
@pytest.mark.parametrize("before", ["", "x", "AI", " and so\n", "é"])
def test_a_breaker_is_seen_however_it_is_tokenized(smollm2: LoadedModel, before: str, text: str):
    """A phrase, the breaker, and the phrase again: nothing before the breaker counts."""
    tokenizer = smollm2.tokenizer
    breakers = find_breakers(tokenizer, (text,))
    phrase = tokenizer.encode(" one two three", add_special_tokens=False)
    context = [*phrase, *tokenizer.encode(before + text, add_special_tokens=False), *phrase[:-1]]
    dry = Dry(1.0, 2.0, 1, -1, breakers)
    assert dry.penalties(context) == {phrase[-1]: 2.0 ** (len(phrase) - 2)}
    longer = [*phrase, *phrase, *context[len(phrase) :]]
    assert dry.penalties(longer) == dry.penalties(context)
    assert max(Dry(1.0, 2.0, 1, -1, NONE).penalties(context * 2).values()) > 2.0 ** (len(phrase) - 2)


class SpacedTokenizer:
    """Puts a space before every text, as those of the Llama family do; single characters, and some longer tokens."""

    tokens = (" ", "\n", "U", "s", "e", "r", ":", "Us", "er:", "User", " User", "user:", "x")
    vocab_size = len(tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id].encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        left, ids = " " + text, []
        while left:
            token = max((each for each in self.tokens if left.startswith(each)), key=len)
            ids.append(self.tokens.index(token))
            left = left.removeprefix(token)
        return ids


def test_a_tokenizer_that_begins_texts_with_a_space():
    tokenizer = SpacedTokenizer()
    breakers = find_breakers(tokenizer, ("User:",))
    as_text = Counter(
        (tokenizer.tokens[head], *(tokenizer.tokens[token] for token in tail))
        for head, tails in breakers.begun.items()
        for tail in tails
    )
    assert as_text == Counter([("U", "s", "er:"), ("Us", "er:"), ("User", ":"), (" User", ":")])
    assert not breakers.whole
