"""Drafts by prompt lookup (Saxena 2023): what followed when the last few tokens came before.

Answers copy: quotations, edits of a text or a program, names, JSON keys. The longest suffix of a branch's tokens
that has occurred earlier, in the prompt or the answer, at its latest occurrence, makes a draft in microseconds.
Knows token ids only; no tensors, no scheduling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.speculation.base import Owners, Trust, Wish

if TYPE_CHECKING:
    from cadenza.decoding.scheduler import Step

LONGEST = 3  # tokens that are looked up
_FIRST_TRUST = ((0.0, 1.0), (1.5, 5.0), (2.5, 5.0), (4.0, 5.0))
"""Right ones among judged tokens, by the length of what was found, before anything is known of a branch."""


class NgramIndex:
    """Where each n-gram of a text was last continued."""

    def __init__(self) -> None:
        self._positions: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Sequence[int], start: int, end: int) -> None:
        """Learn what the tokens at positions `start … end-1` were preceded by."""
        positions = self._positions
        for position in range(max(start, 1), end):
            for length in range(1, min(LONGEST, position) + 1):
                positions[tuple(tokens[position - length : position])] = position

    def get(self, ngram: tuple[int, ...]) -> int | None:
        """The position of the token that followed."""
        return self._positions.get(ngram)


class PromptLookup:
    """Guesses how one branch goes on, and keeps count of how often that comes true."""

    def __init__(self, in_prompt: NgramIndex, num_prompt_tokens: int) -> None:
        """`in_prompt` indexes the prompt; branches that share the prompt may share it."""
        self._in_prompt = in_prompt
        self._in_answer = NgramIndex()
        self._num_known = num_prompt_tokens
        self._trust = [Trust(*first) for first in _FIRST_TRUST]
        self._length = 0
        self._guess: list[int] = []

    @property
    def acceptance(self) -> float:
        """How likely a token of the last guess is to be right."""
        return self._trust[self._length].acceptance

    def guess(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may come after `tokens`, which only ever grow between two calls."""
        self._trust[self._length].learn(self._guess, tokens[self._num_known :])
        self._in_answer.add(tokens, self._num_known, len(tokens))
        self._num_known = len(tokens)
        self._length, position = self._find(tokens)
        self._guess = _copy(tokens, position, limit) if self._length else []
        return self._guess

    def _find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The length of the longest suffix that came before, and where its latest occurrence was continued."""
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            ngram = tuple(tokens[-length:])
            for index in (self._in_answer, self._in_prompt):
                position = index.get(ngram)
                if position is not None:
                    return length, position
        return 0, 0


def _copy(tokens: Sequence[int], position: int, limit: int) -> list[int]:
    """`limit` tokens from `position` on; past the end, the copy itself is copied: a loop goes on as a loop."""
    period = len(tokens) - position
    return [tokens[position + offset % period] for offset in range(limit)]


@dataclass(slots=True)
class _Prompt:
    index: NgramIndex
    users: set[Branch] = field(default_factory=set)


class NgramDrafter:
    """The lookups of all branches; those of one request share the index of its prompt."""

    def __init__(self) -> None:
        self._lookups: dict[Branch, PromptLookup] = {}
        self._prompts: dict[tuple[int, int], _Prompt] = {}
        self._guesses: dict[Branch, list[int]] = {}

    def wish(self, branch: Branch, limit: int) -> Wish | None:
        lookup = self._lookups.get(branch) or self._begin(branch)
        guess = self._guesses[branch] = lookup.guess(branch.token_ids, limit)
        return Wish(len(guess), lookup.acceptance) if guess else None

    def _begin(self, branch: Branch) -> PromptLookup:
        prompt = self._prompts.get(branch.request)
        if prompt is None:
            prompt = self._prompts[branch.request] = _Prompt(NgramIndex())
            prompt.index.add(branch.token_ids, 0, branch.num_prompt_tokens)
        prompt.users.add(branch)
        lookup = self._lookups[branch] = PromptLookup(prompt.index, branch.num_prompt_tokens)
        return lookup

    def propose(self, step: "Step", room: Mapping[Branch, int], owners: Owners) -> dict[Branch, list[int]]:
        return {branch: self._guesses[branch][:count] for branch, count in room.items()}

    def forget(self, branch: Branch) -> None:
        if self._lookups.pop(branch, None) is None:
            return
        del self._guesses[branch]
        prompt = self._prompts[branch.request]
        prompt.users.remove(branch)
        if not prompt.users:
            del self._prompts[branch.request]
