"""The masks under which a draft model draws, so that it does not draft what a constraint forbids.

A clone of the branch's matcher follows the drafts; one that fails only ends the drafts of its branch. Knows matchers;
no models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadenza.decoding.bitmask import empty_rows
from cadenza.decoding.branch import Branch
from cadenza.decoding.constraints.matcher import Bitmask, Matcher
from cadenza.decoding.speculation.base import Owners


@dataclass(slots=True)
class _Ahead:
    """A branch with the drafts that it has so far."""

    matcher: Matcher | None
    remaining: int
    eos_token_ids: frozenset[int]

    def fill(self, row: Bitmask) -> bool:
        """Whether a draft can be drawn."""
        assert self.matcher is not None
        try:
            self.matcher.fill(row, self.remaining)
        except BaseException:  # a panic in native code is no Exception; the branch's own matcher will say so
            return False
        return True

    def accept(self, token_id: int) -> bool:
        """Whether another draft may follow this one."""
        try:
            is_kept = self.matcher is None or self.matcher.accept(token_id, self.remaining) == token_id
            is_ended = self.matcher is not None and self.matcher.is_ended
        except BaseException:
            return False
        self.remaining -= 1
        return is_kept and not is_ended and self.remaining > 1 and token_id not in self.eos_token_ids


class MasksAhead:
    def __init__(self, vocab_size: int, branches: Iterable[Branch], owners: Owners) -> None:
        self._vocab_size = vocab_size
        self._ahead: dict[Branch, _Ahead] = {}
        for branch in branches:
            owner = owners[branch]
            try:
                matcher = None if branch.matcher is None else branch.matcher.fork()
            except BaseException:
                continue
            self._ahead[branch] = _Ahead(matcher, owner.remaining(branch), owner.eos_token_ids)

    def fill(self, branches: Sequence[Branch]) -> tuple[Tensor | None, dict[Branch, int | None]]:
        """A bitmask, and the row in it of each of `branches` that can be drawn for; None: it has no constraint."""
        known = [branch for branch in branches if branch in self._ahead]
        constrained = [branch for branch in known if self._ahead[branch].matcher is not None]
        row_of: dict[Branch, int | None] = {branch: None for branch in known if branch not in constrained}
        if not constrained:
            return None, row_of
        words = empty_rows(len(constrained), self._vocab_size)
        for number, branch in enumerate(constrained):
            if self._ahead[branch].fill(words[number]):
                row_of[branch] = number
        return torch.from_numpy(words), row_of

    def accept(self, branch: Branch, token_id: int) -> bool:
        """Go on by a draft; whether another one may follow it."""
        return self._ahead[branch].accept(token_id)
