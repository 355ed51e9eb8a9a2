"""A sampler that knows nothing of constraints and likes no token better than another, and what it draws from.

Compiles here rather than in a worker process.
"""

import random

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.constraint import Constraint, TokenTables
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.matcher import Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary


def a_small_vocabulary() -> TokenTables:
    """Bytes, pieces of JSON and of words, parts of characters, ids without text, and two tokens that end."""
    pieces = [
        '{"',
        '":',
        '",',
        '"}',
        "[]",
        "{}",
        '":"',
        "tr",
        "true",
        "null",
        "12",
        "0.",
        "-1",
        "e5",
        " ",
        "  ",
    ]
    pieces += ["ab", "abc", "aa", "ba", "a1", "x-", "\n", "\\u00", '\\"', "é", "日", "the ", "lower", "9]"]
    parts = ["é".encode()[:1], "🎵".encode()[:2], "🎵".encode()[2:] + b'"', b"\xff\xfe"]
    tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in pieces] + parts
    tokens += [b"", b"", b"", b"ab"]
    vocabulary = Vocabulary(tokens, [len(tokens) - 4, len(tokens) - 2])
    return TokenTables(vocabulary, vocabulary.segment)


SMALL = a_small_vocabulary()


def constraint_of(spec: ConstraintSpec, tables: TokenTables, max_seconds: float = 5.0) -> Constraint:
    compiled = compile_spec(spec, tables.vocabulary, Effort(Limits(max_seconds=max_seconds)))
    return Constraint(spec, compiled, tables, 0)


def mask(matcher: Matcher, vocabulary: Vocabulary, remaining: int) -> NDArray[np.int32]:
    row = np.full(vocabulary.num_words, 0x5A5A5A5A, np.int32)
    matcher.fill(row, remaining)
    return row


def bits(row: NDArray[np.int32]) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    return found


def allowed(matcher: Matcher, vocabulary: Vocabulary, remaining: int) -> list[int]:
    found = bits(mask(matcher, vocabulary, remaining))
    ends = set(vocabulary.eos_ids)
    assert ends <= set(found) if matcher.is_complete else not ends & set(found)
    assert all(vocabulary.tokens[token_id] for token_id in set(found) - ends), "ids without text"
    assert found, "there is always a way to go on"
    return found


def adversarial(constraint: Constraint, budget: int, rng: random.Random) -> str:
    """What the sampler writes."""
    vocabulary, matcher = constraint.tables.vocabulary, constraint.matcher()
    tokens: list[int] = []
    while len(tokens) < budget and not (tokens and matcher.is_ended):
        candidates = allowed(matcher, vocabulary, budget - len(tokens))
        text_only = [token_id for token_id in candidates if token_id not in vocabulary.eos_ids]
        drawn = rng.choice(text_only if text_only and rng.random() < 0.9 else candidates)
        chosen = matcher.accept(drawn, budget - len(tokens))
        assert chosen in candidates
        assert chosen == drawn or matcher.limited
        if chosen in vocabulary.eos_ids:
            break
        tokens.append(chosen)
        tokens += matcher.forced(budget - len(tokens))
    assert matcher.is_complete
    assert len(tokens) <= budget
    return b"".join(vocabulary.tokens[token_id] for token_id in tokens).decode()


def budgets(constraint: Constraint) -> list[int]:
    least = max(constraint.min_tokens, 1)
    return [least, least + 1, least + 3, least + 15, least + 40]
