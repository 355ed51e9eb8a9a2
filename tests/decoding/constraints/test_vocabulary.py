"""Vocabularies as constraints see them: which ids are text, their trie, and cutting bytes into tokens."""

import pickle
import random
from collections.abc import Callable, Iterator

import pytest

from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel

SMALL = [b"", b"a", b"b", b"ab", b"ba", b"abab", b"a", b"\xc3", b"\xa9", "é".encode(), b"bb\xc3", b"ab", b"c"]


class FakeTokenizer:
    special_ids = frozenset({0, 1})
    added_ids = frozenset({0, 1, 4})
    vocab_size = 6

    def token_bytes(self, token_id: int) -> bytes:
        return [b"<s>", b"</s>", b"a", b"</", b"</think>", b"b"][token_id]


def spellings(data: bytes, tokens: list[bytes]) -> Iterator[list[bytes]]:
    """Every way to cut the bytes into tokens."""
    if not data:
        yield []
    for token in tokens:
        if token and data.startswith(token):
            for rest in spellings(data[len(token) :], tokens):
                yield [token, *rest]


def test_special_and_added_tokens_are_no_text() -> None:
    plain = Vocabulary.from_tokenizer(FakeTokenizer(), [1], 8)
    assert plain.tokens == (b"", b"", b"a", b"</", b"", b"b", b"", b"")
    assert plain.eos_ids == (1,)
    assert plain.num_words == 1
    added = Vocabulary.from_tokenizer(FakeTokenizer(), [1], 8, with_added=True)
    assert added.tokens == (b"", b"", b"a", b"</", b"</think>", b"b", b"", b"")
    assert Vocabulary.from_tokenizer(FakeTokenizer(), [1], 3).tokens == (b"", b"", b"a")


def test_ids_that_end_an_answer_are_no_text_and_must_exist() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"c"], [7, 2, -1, 2])
    assert vocabulary.eos_ids == (2,)
    assert vocabulary.tokens == (b"a", b"b", b"")


def test_fingerprint_tells_vocabularies_apart() -> None:
    tokens = [b"a", b"bc", b"d"]
    different = [
        Vocabulary(tokens, []),
        Vocabulary(tokens, [0]),
        Vocabulary([b"ab", b"c", b"d"], []),
        Vocabulary([b"a", b"bc"], []),
        Vocabulary([b"bc", b"a", b"d"], []),
    ]
    assert len({vocabulary.fingerprint for vocabulary in different}) == len(different)
    assert Vocabulary(tokens, []).fingerprint == different[0].fingerprint


def test_pickling_keeps_what_matters() -> None:
    vocabulary = Vocabulary(SMALL, [12])
    assert vocabulary.trie is vocabulary.trie
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert (copy.tokens, copy.eos_ids, copy.fingerprint) == (
        vocabulary.tokens,
        vocabulary.eos_ids,
        vocabulary.fingerprint,
    )


@pytest.mark.parametrize("seed", range(5))
def test_trie_spells_every_token(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [bytes(rng.choices(b"ab\x00\xff", k=rng.randrange(7))) for _ in range(rng.randrange(1, 300))]
    trie = Vocabulary(tokens, []).trie
    path = {0: b""}
    for node in range(1, trie.num_nodes):
        assert trie.parent[node] < node
        path[node] = path[int(trie.parent[node])] + bytes([trie.byte[node]])
    assert [path[node] for node in trie.token_node] == tokens
    assert set(path.values()) == {token[:end] for token in tokens for end in range(len(token) + 1)}
    assert list(path.values()) == sorted(path.values(), key=lambda text: (len(text), text))
    for depth, (start, end) in enumerate(zip(trie.level_start, trie.level_start[1:], strict=False)):
        assert all(len(path[node]) == depth for node in range(start, end))
    assert trie.level_start[-1] == trie.num_nodes


def test_trie_of_nothing() -> None:
    assert Vocabulary([], []).trie.num_nodes == 1
    assert Vocabulary([b"", b""], []).trie.token_node.tolist() == [0, 0]


def test_segment_is_a_shortest_spelling() -> None:
    vocabulary = Vocabulary(SMALL, [12])
    rng = random.Random(3)
    found = 0
    for _ in range(400):
        data = b"".join(
            rng.choices([b"a", b"b", b"\xc3", b"\xa9", b"c"], [6, 6, 2, 2, 0.3], k=rng.randrange(9))
        )
        ways = list(spellings(data, sorted({*SMALL[:12]})))
        ids = vocabulary.segment(data)
        if not ways:
            assert ids is None
            continue
        found += 1
        assert ids is not None
        assert b"".join(vocabulary.tokens[token_id] for token_id in ids) == data
        assert len(ids) == min(map(len, ways))
        assert all(token_id == vocabulary.tokens.index(vocabulary.tokens[token_id]) for token_id in ids)
    assert 100 < found < 400


def test_segment_prefers_long_tokens_first() -> None:
    vocabulary = Vocabulary([b"a", b"aa", b"aaa", b"x"], [])
    assert vocabulary.segment(b"aaaa") == [2, 0]
    assert vocabulary.segment(b"") == []
    assert vocabulary.segment(b"ax") == [0, 3]
    assert vocabulary.segment(b"ay") is None


def test_what_single_bytes_spell() -> None:
    vocabulary = Vocabulary([bytes([byte]) for byte in range(128)] + [b"\xc3\xa9"], [65])
    assert vocabulary.spells(b"xyz")
    assert vocabulary.spells(b"")
    assert not vocabulary.spells("é".encode())
    assert not vocabulary.spells(b"xyzA")  # the id that ends an answer is no text


def encode_with(pieces: dict[bytes, list[int]]) -> Callable[[bytes], list[int] | None]:
    return lambda data: pieces.get(data)


def test_forced_tokens_are_the_models_own_where_nothing_can_change_them() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"c", b"cd", b"e"], [])
    own = encode_with({b"abe": [0, 1, 5], b"abc": [2, 3], b"ab": [2]})
    assert vocabulary.forced_tokens(b"abe", own) == [0, 1, 5]
    assert vocabulary.forced_tokens(b"abc", own) == [2]  # the end may become cd
    assert vocabulary.forced_tokens(b"abc", own, lambda rest: rest == b"e") == [2, 3]
    assert vocabulary.forced_tokens(b"abc", own, lambda rest: rest == b"d") == [2]
    assert vocabulary.forced_tokens(b"abb", own) == [2, 1]  # the model's own are unknown: the fewest
    assert vocabulary.forced_tokens(b"az", own) == []
    assert vocabulary.forced_tokens(b"", own) == []


def test_forced_tokens_look_inside_the_last_token() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"bcd", b"z"], [])
    own = encode_with({b"ab": [2], b"aab": [0, 2]})
    assert vocabulary.forced_tokens(b"ab", own) == []  # a and bcd may be what the model would write
    assert vocabulary.forced_tokens(b"aab", own) == [0]
    assert vocabulary.forced_tokens(b"ab", own, lambda rest: rest in (b"c", b"ce")) == [2]
    assert vocabulary.forced_tokens(b"ab", own, lambda rest: rest in (b"c", b"cd")) == []


@pytest.mark.parametrize("wrong", [[9, 9], [1, 0], [4]])
def test_forced_tokens_spell_the_run_whatever_the_tokenizer_says(wrong: list[int]) -> None:
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"c"], [3])
    ids = vocabulary.forced_tokens(b"ab", encode_with({b"ab": wrong}))
    assert ids == [2]


def test_real_vocabulary(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    vocabulary = Vocabulary.from_tokenizer(tokenizer, smollm2.eos_token_ids, tokenizer.vocab_size)
    assert vocabulary.size == 49152
    assert {vocabulary.tokens[token_id] for token_id in tokenizer.special_ids} == {b""}
    assert set(vocabulary.eos_ids) == set(smollm2.eos_token_ids)
    text = '{"name": "Zoë", "tags": ["🦜", "naïve"],\n    "n": 1234567}'
    ids = vocabulary.segment(text.encode())
    assert ids is not None
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(tokenizer.encode(text, add_special_tokens=False))
    forced = vocabulary.forced_tokens(b'{"name": "', tokenizer.encode_bytes)
    own = tokenizer.encode('{"name": "Zoë"', add_special_tokens=False)
    assert forced
    assert own[: len(forced)] == forced
