"""The rows for drafts, against a matcher of the same text that is stepped through them."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.lookahead import fill_ahead
from cadenza.decoding.constraints.matcher import GrammarMatcher, Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

from .sampling import SMALL, allowed, bits, budgets, constraint_of, mask

NUM_DRAFTS = 5
TICKET = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 9}, "tags": {"items": {"type": "integer"}}},
    "required": ["title"],
}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": {"enum": ["ab", 12, None]}, "end": "</f>"}],
    "triggers": ["<f"],
}
SPECS = {
    "regex": ConstraintSpec.regex("([a-z]{1,9}, )*[0-9]+(abc|)"),
    "choice": ConstraintSpec.choice(["aa", "aaba", "true", "the lower"]),
    "schema": ConstraintSpec.json_schema(TICKET),
    "lark": ConstraintSpec.grammar('start: "(" start ")" | start "," start | /[ab]{1,4}/'),
    "gbnf": ConstraintSpec.grammar('root ::= ("[" root? "]" | "12" [0-9]*)+'),
    "tag": ConstraintSpec.structural_tag(TAG),
}


def ahead(
    matcher: Matcher, drafts: Sequence[int], remaining: int, vocabulary: Vocabulary
) -> NDArray[np.int32]:
    rows = np.full((len(drafts) + 1, vocabulary.num_words), 0x5A5A5A5A, np.int32)
    fill_ahead(matcher, drafts, remaining, rows)
    return rows


def again(constraint: Constraint, tokens: Sequence[int], budget: int) -> Matcher:
    """A matcher made anew that has followed the tokens."""
    matcher = constraint.matcher()
    for number, token_id in enumerate(tokens):
        mask(matcher, constraint.tables.vocabulary, budget - number)
        assert matcher.accept(token_id, budget - number) == token_id
    return matcher


def stepped(
    constraint: Constraint, tokens: Sequence[int], drafts: Sequence[int], budget: int
) -> NDArray[np.int32]:
    """The rows as one token a step would meet them."""
    vocabulary = constraint.tables.vocabulary
    rows = np.zeros((len(drafts) + 1, vocabulary.num_words), np.int32)
    matcher, remaining = again(constraint, tokens, budget), budget - len(tokens)
    for number, token_id in enumerate(drafts):
        rows[number] = mask(matcher, vocabulary, remaining)
        if token_id not in bits(rows[number]):
            return rows
        if matcher.accept(token_id, remaining) != token_id:
            return rows
        remaining -= 1
        if remaining == 0 or matcher.is_ended or token_id in vocabulary.eos_ids:
            return rows
    rows[-1] = mask(matcher, vocabulary, remaining)
    return rows


def drafted(matcher: Matcher, remaining: int, vocabulary: Vocabulary, rng: random.Random) -> Iterator[int]:
    """Mostly a way on; at times it goes wrong, or on behind the end."""
    matcher = matcher.fork()
    for _ in range(NUM_DRAFTS):
        if rng.random() < 0.08 or remaining == 0 or matcher.is_ended:
            yield rng.randrange(vocabulary.size)
        else:
            drawn = rng.choice(allowed(matcher, vocabulary, remaining))
            matcher.accept(drawn, remaining)
            remaining -= 1
            yield drawn  # which the budget may have replaced


@pytest.mark.parametrize("name", SPECS)
def test_rows_are_those_that_one_token_a_step_would_meet(name: str) -> None:
    constraint, rng, vocabulary = constraint_of(SPECS[name], SMALL), random.Random(name), SMALL.vocabulary
    reached = [0] * (NUM_DRAFTS + 2)
    for budget in budgets(constraint) * 4:
        tokens: list[int] = []
        matcher = constraint.matcher()
        while len(tokens) < budget and not matcher.is_ended:
            remaining = budget - len(tokens)
            drafts = list(drafted(matcher, remaining, vocabulary, rng))
            before = mask(matcher, vocabulary, remaining)
            state = (matcher.is_complete, matcher.is_ended, matcher.limited)
            rows = ahead(matcher, drafts, remaining, vocabulary)
            np.testing.assert_array_equal(rows, stepped(constraint, tokens, drafts, budget))
            np.testing.assert_array_equal(mask(matcher, vocabulary, remaining), before)
            assert (matcher.is_complete, matcher.is_ended, matcher.limited) == state
            reached[int(rows.any(1).sum())] += 1
            tokens.append(matcher.accept(rng.choice(bits(before)), remaining))
    assert reached[0] == 0
    assert all(reached[1:3])
    assert sum(reached[3:]) > 5


def test_rows_over_the_real_vocabulary(real_tables: TokenTables) -> None:
    constraint = constraint_of(SPECS["schema"], real_tables)
    drafts = real_tables.encode(b'{"title": "A b", "tags": [1, 25') or []
    assert len(drafts) > 8
    rows = ahead(constraint.matcher(), drafts, 90, real_tables.vocabulary)
    np.testing.assert_array_equal(rows, stepped(constraint, [], drafts, 90))
    assert rows.any(1).all()


class Unforked:
    """A matcher that cannot fork."""

    def fill(self, row: NDArray[np.int32], remaining: int) -> None:
        row[:] = remaining


def test_without_drafts_nothing_is_forked() -> None:
    rows = np.zeros((1, 3), np.int32)
    fill_ahead(Unforked(), [], 7, rows)  # type: ignore[arg-type]
    assert rows.tolist() == [[7, 7, 7]]


def test_a_draft_ends_where_the_budget_would_replace_it() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"(", b")", b"</s>"], [4])
    tables = TokenTables(vocabulary, vocabulary.segment)
    constraint = constraint_of(ConstraintSpec.grammar('start: "(" start ")" | "a" "b"*'), tables)
    filled = {
        budget: ahead(constraint.matcher(), [2, 2, 0, 1, 3, 3], budget, vocabulary).any(1).tolist()
        for budget in (9, 4, 3)
    }
    assert filled[9] == [True] * 6 + [False], "it has ended behind the last bracket"
    assert filled[4] == [True, True, False, False, False, False, False]
    assert filled[3] == [True, True] + [False] * 5


@pytest.mark.parametrize("name", ["choice", "lark"])
def test_nothing_is_looked_for_behind_an_end(name: str) -> None:
    constraint, vocabulary = constraint_of(SPECS[name], SMALL), SMALL.vocabulary
    rows = ahead(constraint.matcher(), [*b"aa", vocabulary.eos_ids[1], ord("a")], 99, vocabulary)
    assert vocabulary.eos_ids[1] in bits(rows[2])
    assert not rows[3:].any()
    for wrong in (vocabulary.size, 10**9, -1, -(10**9)):
        assert ahead(constraint.matcher(), [wrong], 99, vocabulary).any(1).tolist() == [True, False]


def test_what_a_draft_asks_too_much_of_is_no_failure_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher, vocabulary = constraint_of(SPECS["schema"], SMALL).matcher(), SMALL.vocabulary
    assert isinstance(matcher, GrammarMatcher)
    advance, num_bytes = Parser.advance, 0

    def failing(self: Parser, data: bytes) -> bool:
        nonlocal num_bytes
        num_bytes += len(data)
        if num_bytes > 3:
            raise MatcherError("too ambiguous")
        return advance(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "advance", failing)
        rows = ahead(matcher, list(b'{"title'), 99, vocabulary)
    assert rows.any(1).tolist() == [True] * 4 + [False] * 4
    np.testing.assert_array_equal(rows[0], mask(matcher, vocabulary, 99))
