"""The two sources of a grammar's masks, llguidance and our own parser, against each other, bit for bit."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.compiled import CompiledContextFree
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.grammar_masks import GrammarMasks
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher, MaskTables
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel

DATA = Path(__file__).parents[2] / "data" / "constraints"
TICKET = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "priority": {"enum": ["low", "medium", "high"]},
        "estimate": {"type": "number", "minimum": 0.5, "maximum": 80},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-zé]+$"}, "maxItems": 3},
    },
    "required": ["title", "estimate"],
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "additionalProperties": {"$ref": "#/$defs/node"}}},
}
SPECS = {
    **{
        path.stem: ConstraintSpec.grammar(path.read_text(encoding="utf-8"))
        for path in sorted(DATA.glob("*.lark"))
    },
    "ticket": ConstraintSpec.json_schema(TICKET),
    "tree": ConstraintSpec.json_schema(TREE),
    "compact": ConstraintSpec.json_object(any_whitespace=False),
}


@pytest.fixture(scope="module")
def real(smollm2: LoadedModel) -> Vocabulary:
    return Vocabulary.from_tokenizer(smollm2.tokenizer, smollm2.eos_token_ids, smollm2.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def small(real: Vocabulary) -> Vocabulary:
    """Every twelfth token of the real one, all bytes, and two tokens that end an answer."""
    tokens = [bytes([byte]) for byte in range(256)] + list(real.tokens[::12]) + [b"", b""]
    return Vocabulary(tokens, [len(tokens) - 2, len(tokens) - 1])


@cache
def tables(vocabulary: Vocabulary) -> MaskTables:
    return MaskTables(vocabulary)


@cache
def compiled(name: str, vocabulary: Vocabulary) -> CompiledContextFree:
    answer = compile_spec(SPECS[name], vocabulary, Effort(Limits(max_seconds=30.0)))
    assert isinstance(answer, CompiledContextFree)
    return answer


def new(name: str, vocabulary: Vocabulary) -> tuple[GrammarMasks, Parser]:
    constraint = compiled(name, vocabulary)

    def build() -> MaskMatcher:
        return MaskMatcher.build(constraint.text, tables(vocabulary))

    return GrammarMasks(vocabulary, build), Parser(constraint.grammar)


def without_llguidance(masks: GrammarMasks) -> GrammarMasks:
    def never() -> MaskMatcher:
        raise MatcherError("out of fuel")

    return GrammarMasks(masks.vocabulary, never)


def allowed(masks: GrammarMasks, parser: Parser) -> set[int]:
    """The tokens that are text; those that end it are the matcher's to decide."""
    row = np.full(masks.vocabulary.num_words, 0x5A5A5A5A, np.int32)
    masks.fill(row, parser)
    return bits(row).difference(masks.vocabulary.eos_ids)


def bits(row: NDArray[np.int32]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def step(masks: GrammarMasks, parser: Parser, token_id: int) -> None:
    assert parser.advance(masks.vocabulary.tokens[token_id])
    masks.advance(token_id)


def walk(name: str, vocabulary: Vocabulary, num_steps: int, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    masks, parser = new(name, vocabulary)
    own = without_llguidance(masks)
    for _ in range(num_steps):
        theirs = allowed(masks, parser)
        assert theirs == allowed(own, parser)
        assert not masks._has_failed
        if not theirs:
            assert parser.is_ended
            break
        # half of the time a short token, or most walks would soon be inside a long text
        candidates = sorted(theirs, key=lambda token: (len(vocabulary.tokens[token]), token))
        choice = rng.choice(candidates[:12] if rng.random() < 0.5 else candidates)
        step(masks, parser, choice)
        own.advance(choice)


@pytest.mark.parametrize("name", SPECS)
def test_both_sources_agree_along_random_walks(small: Vocabulary, name: str) -> None:
    for seed in range(5):
        walk(name, small, 25, seed)


@pytest.mark.parametrize("name", ["json", "sql", "entities", "ticket"])
def test_both_sources_agree_over_the_real_vocabulary(real: Vocabulary, name: str) -> None:
    walk(name, real, 8, 0)


@pytest.mark.parametrize("name", SPECS)
def test_each_byte_of_a_token_may_follow_where_the_token_may(small: Vocabulary, name: str) -> None:
    """A third opinion: the parser asked for one token at a time."""
    masks, parser = new(name, small)
    rng = random.Random(name)
    for _ in range(6):
        found = allowed(masks, parser)
        sampled = rng.sample(range(small.size), 400)
        for token_id in [*sampled, *sorted(found)[:20]]:
            text = small.tokens[token_id]
            fits = bool(text) and parser.advance(text)
            if fits:
                parser.rollback(len(text))
            assert fits == (token_id in found), (token_id, text)
        if not found:
            break
        step(masks, parser, rng.choice(sorted(found)))


def test_nothing_is_built_before_a_mask_is_asked_for(small: Vocabulary) -> None:
    """To go on and to fork is done on the engine's thread, to fill is not."""
    built: list[MaskMatcher] = []
    plain, parser = new("json", small)

    def building() -> MaskMatcher:
        built.append(plain.build())
        return built[-1]

    masks = GrammarMasks(small, building)
    text = b'{"a": [1, 2, {"b": "' + b"c" * 60 + b'"}, 3'
    for byte in text:  # llguidance's lexer gets fuel when masks are computed, and here there are none
        step(masks, parser, byte)
    fork = masks.fork()
    assert built == []
    expected = allowed(without_llguidance(masks), parser)
    assert allowed(masks, parser) == allowed(fork, parser) == expected
    assert len(built) == 2, "there was nothing yet to copy"
    late = masks.fork()
    late_parser = parser.fork()
    step(late, late_parser, ord("]"))
    step(masks, parser, ord("7"))
    assert len(built) == 2
    assert allowed(late, late_parser) == allowed(without_llguidance(late), late_parser)
    assert allowed(masks, parser) == allowed(without_llguidance(masks), parser) != allowed(late, late_parser)
    assert allowed(fork, late_parser) == expected, "what the others did is nothing to it"
    assert len(built) == 2, "copied"


@pytest.mark.parametrize("fails_at", [0, 1, 5])
@pytest.mark.parametrize("method", ["fill", "advance"])
def test_where_llguidance_fails_our_own_masks_go_on(
    small: Vocabulary, monkeypatch: pytest.MonkeyPatch, method: str, fails_at: int
) -> None:
    masks, parser = new("json", small)
    own = without_llguidance(masks)
    original, calls = getattr(MaskMatcher, method), []

    def failing(self: MaskMatcher, *arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > fails_at:
            raise MatcherError("llguidance: out of fuel")
        original(self, *arguments)

    monkeypatch.setattr(MaskMatcher, method, failing)
    for byte in b'{"a":[{"b":null},12':
        assert allowed(masks, parser) == allowed(own, parser)
        step(masks, parser, byte)
        own.advance(byte)
    assert len(calls) == fails_at + 1, "one failure is enough"
    fork = masks.fork()
    assert allowed(fork, parser) == allowed(own, parser)
    assert len(calls) == fails_at + 1, "for forks as well"


def test_few_masks_are_kept(small: Vocabulary) -> None:
    masks, parser = new("json", small)
    own = without_llguidance(masks)
    for byte in b"[" * 150:
        allowed(own, parser)
        step(own, parser, byte)
    assert 0 < len(own._known) <= 64
