"""Masks of whole tokens against the parser, token by token, on made-up vocabularies and a real one."""

import random
import threading

import numpy as np
import pytest

from cadenza.decoding.constraints.automata.expression import ANY_TEXT, Concat, Expression, Literal, Not
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintTooComplex, MatcherError
from cadenza.decoding.constraints.grammar.compiled import compile_grammar
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_grammar import to_llguidance
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher, MaskTables, check_llguidance
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel


def rx(pattern: str) -> Expression:
    return parse_regex(pattern, "python", Effort())


STRING = rx(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-f]{4})*"')
LISTS = Grammar(
    "start",
    {
        "start": ((Literal("["), "items", Literal("]")),),
        "items": ((), ("item",), ("item", Literal(", "), "items")),
        "item": ((STRING,), (rx(r"-?[1-9][0-9]*(?:\.[0-9]+)?"),), (Literal("true"),), ("start",)),
    },
)
STATEMENTS = Grammar(
    "start",
    {
        "start": (("statement",), ("statement", "start")),
        "statement": (
            (Literal("let "), rx("[a-zé]+"), rx(" ?= ?"), "sum", rx(";\n?")),
            (rx("[a-zé]+"), Literal("("), "sum", Literal(");")),
        ),
        "sum": (
            (rx("[0-9]+"),),
            (rx("[a-zé]+"),),
            ("sum", rx(" ?[+] ?"), "sum"),
            (Literal("("), "sum", Literal(")")),
        ),
    },
)
TOOLS = Grammar(
    "start",
    {
        "start": (("text",), ("text", Literal("<tool>"), "item", Literal("</tool>"), "start")),
        "text": ((Not(Concat((ANY_TEXT, Literal("<tool>"), ANY_TEXT))),),),
        "item": ((STRING,), (rx("[0-9]+"),)),
    },
)
GRAMMARS = {"lists": LISTS, "statements": STATEMENTS, "tools": TOOLS}


def made_up(seed: int) -> Vocabulary:
    """All bytes, tokens of several characters and of parts of characters, duplicates, and ids without text."""
    rng = random.Random(seed)
    pieces = [*'"[],12é😀=', "tr", "ue", "<to", "ol>", "</tool>", "let ", ");", ".5", '":', ", ", "\n"]
    words = ["".join(rng.choices(pieces, k=rng.randint(2, 4))).encode() for _ in range(300)]
    cut = [word[rng.randint(0, 2) : len(word) - rng.randint(0, 2)] for word in words]
    tokens = [bytes([byte]) for byte in range(256)] + words + cut + words[:20] + [b"", b"", b"\xff\xfe"]
    rng.shuffle(tokens)
    empty = [token_id for token_id, token in enumerate(tokens) if not token]
    return Vocabulary(tokens, empty[:2])


def bits(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def mask(matcher: MaskMatcher, vocabulary: Vocabulary) -> set[int]:
    row = np.full(vocabulary.num_words, -1, np.int32)
    matcher.fill(row)
    return bits(row)


def expected(parser: Parser, vocabulary: Vocabulary) -> set[int]:
    """By the tree of all tokens' beginnings."""
    found = set(vocabulary.eos_ids) if parser.is_complete else set()
    by_text: dict[bytes, list[int]] = {}
    for token_id, token in enumerate(vocabulary.tokens):
        if token:
            by_text.setdefault(token, []).append(token_id)
    dead: bytes | None = None
    for token in sorted(by_text):
        if dead is not None and token.startswith(dead):
            continue
        dead = None
        count = next((n for n in range(1, len(token) + 1) if not _may_follow(parser, token[:n])), None)
        if count is None:
            found.update(by_text[token])
        else:
            dead = token[:count]
    return found


def _may_follow(parser: Parser, data: bytes) -> bool:
    if not parser.advance(data):
        return False
    parser.rollback(len(data))
    return True


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("seed", range(3))
def test_masks_of_made_up_vocabularies(name: str, seed: int) -> None:
    vocabulary = made_up(seed)
    text, compiled = to_llguidance(GRAMMARS[name], Effort()), compile_grammar(GRAMMARS[name], Effort())
    tables, rng = MaskTables(vocabulary), random.Random(seed)
    for _ in range(3):
        matcher, parser = MaskMatcher.build(text, tables), Parser(compiled)
        for _ in range(12):
            allowed = mask(matcher, vocabulary)
            assert allowed == expected(parser, vocabulary)
            tokens = sorted(allowed - set(vocabulary.eos_ids))
            if not tokens:
                break
            token_id = rng.choice(tokens)
            matcher.advance(token_id)
            assert parser.advance(vocabulary.tokens[token_id])


@pytest.fixture(scope="module")
def vocabulary(smollm2: LoadedModel) -> Vocabulary:
    return Vocabulary.from_tokenizer(smollm2.tokenizer, smollm2.eos_token_ids, smollm2.config.vocab_size)


@pytest.fixture(scope="module")
def tables(vocabulary: Vocabulary) -> MaskTables:
    return MaskTables(vocabulary)


@pytest.mark.parametrize(
    ("name", "beginnings"),
    [
        ("lists", ["", '["a', "[1", '["é\\']),
        ("statements", ["le", "let x = (1"]),
        ("tools", ["", "Hello <to", "<tool>", '<tool>"x']),
    ],
)
def test_masks_of_a_real_vocabulary(
    name: str, beginnings: list[str], vocabulary: Vocabulary, tables: MaskTables
) -> None:
    text, compiled = to_llguidance(GRAMMARS[name], Effort()), compile_grammar(GRAMMARS[name], Effort())
    for beginning in beginnings:
        matcher, parser = MaskMatcher.build(text, tables), Parser(compiled)
        for token_id in vocabulary.segment(beginning.encode()) or []:
            matcher.advance(token_id)
        assert parser.advance(beginning.encode())
        assert mask(matcher, vocabulary) == expected(parser, vocabulary)


def test_every_tokenization_of_the_only_text_is_allowed(vocabulary: Vocabulary, tables: MaskTables) -> None:
    """A model may spell a word as it likes, also where there is no choice of words."""
    grammar = Grammar("start", {"start": ((Literal("hello world"),),)})
    matcher = MaskMatcher.build(to_llguidance(grammar, Effort()), tables)
    spelled = {vocabulary.tokens[token_id] for token_id in mask(matcher, vocabulary)}
    assert {b"h", b"he", b"hello"} <= spelled
    for byte in b"hello world":
        matcher.advance(vocabulary.tokens.index(bytes([byte])))
    assert mask(matcher, vocabulary) == set(vocabulary.eos_ids)


def test_special_tokens_are_not_text(vocabulary: Vocabulary, tables: MaskTables) -> None:
    grammar = Grammar("start", {"start": ((ANY_TEXT,),)})
    allowed = mask(MaskMatcher.build(to_llguidance(grammar, Effort()), tables), vocabulary)
    without_text = {token_id for token_id, token in enumerate(vocabulary.tokens) if not token}
    assert allowed & without_text == set(vocabulary.eos_ids)


def test_no_token_ends_a_text_that_is_not_complete(vocabulary: Vocabulary, tables: MaskTables) -> None:
    grammar = Grammar("start", {"start": ((Literal("ab"), "start"), (Literal("c"),))})
    matcher = MaskMatcher.build(to_llguidance(grammar, Effort()), tables)
    assert not mask(matcher, vocabulary) & set(vocabulary.eos_ids)
    matcher.advance(vocabulary.tokens.index(b"c"))
    assert mask(matcher, vocabulary) == set(vocabulary.eos_ids)


def small() -> tuple[Vocabulary, MaskTables, str]:
    vocabulary = made_up(0)
    return vocabulary, MaskTables(vocabulary), to_llguidance(LISTS, Effort())


def ids(vocabulary: Vocabulary, text: str) -> list[int]:
    found = vocabulary.segment(text.encode())
    assert found is not None
    return found


def test_forks_go_on_by_themselves() -> None:
    vocabulary, tables, text = small()
    matcher = MaskMatcher.build(text, tables)
    for token_id in ids(vocabulary, '["' + "abcdefgh" * 60 + '", [1, 2'):
        matcher.advance(token_id)
    before = mask(matcher, vocabulary)
    fork = matcher.fork()
    assert mask(fork, vocabulary) == before
    for token_id in ids(vocabulary, "]]"):
        fork.advance(token_id)
    assert mask(fork, vocabulary) == set(vocabulary.eos_ids)
    assert mask(matcher, vocabulary) == before


def test_a_token_that_is_not_allowed_fails_that_matcher_only() -> None:
    vocabulary, tables, text = small()
    matcher, other = MaskMatcher.build(text, tables), MaskMatcher.build(text, tables)
    with pytest.raises(MatcherError, match="doesn't satisfy"):
        matcher.advance(vocabulary.tokens.index(b"x"))
    with pytest.raises(MatcherError):
        mask(matcher, vocabulary)
    assert mask(other, vocabulary)


def test_long_lists_cost_no_more_than_short_ones() -> None:
    """Right recursion, as the grammar has it, would complete all items again at each: a row of thousands."""
    vocabulary, tables, text = small()
    matcher = MaskMatcher.build(text, tables)
    for token_id in ids(vocabulary, "[" + "1, " * 3000 + "1"):
        matcher.advance(token_id)
        mask(matcher, vocabulary)
    for token_id in ids(vocabulary, "]"):
        matcher.advance(token_id)
    assert mask(matcher, vocabulary) == set(vocabulary.eos_ids)


def test_matchers_work_in_threads() -> None:
    vocabulary, tables, text = small()
    compiled = compile_grammar(LISTS, Effort())
    wrong: list[object] = []

    def walk(seed: int) -> None:
        rng, matcher, parser = random.Random(seed), MaskMatcher.build(text, tables), Parser(compiled)
        for _ in range(30):
            allowed = mask(matcher, vocabulary)
            starts = {vocabulary.tokens[token_id][:1] for token_id in allowed if vocabulary.tokens[token_id]}
            if starts != {bytes([byte]) for byte in parser.next_bytes()}:
                wrong.append(seed)
            tokens = sorted(token_id for token_id in allowed if vocabulary.tokens[token_id])
            if not tokens:
                return
            token_id = rng.choice(tokens)
            matcher.advance(token_id)
            parser.advance(vocabulary.tokens[token_id])

    threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_vocabulary_needs_an_end() -> None:
    with pytest.raises(ValueError, match="ends the text"):
        MaskTables(Vocabulary([b"a"], []))


@pytest.mark.parametrize(
    "text", ['start: "a" missing', "start: /(/", 'start: "a"\nstart: "b"'], ids=["rule", "pattern", "twice"]
)
def test_grammars_that_llguidance_does_not_take(text: str) -> None:
    with pytest.raises(ConstraintTooComplex, match="llguidance cannot run"):
        check_llguidance(text)
