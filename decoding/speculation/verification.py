"""The results of one branch's drafts, handed out as far as what is appended agrees with them.

A step brings one result for a branch, and one more behind each of its drafts. The one behind i drafts says what comes
after them, so it counts only if those very tokens have been appended. Knows branches; no strategies, no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadenza.decoding.branch import Branch
from cadenza.decoding.speculation.base import num_equal
from cadenza.decoding.strategies.base import Result


@dataclass(slots=True)
class Verification:
    branch: Branch
    drafts: Sequence[int]
    is_guess: bool
    """False: the drafts are what a constraint has decided on."""
    num_known: int
    """The branch's tokens before the step."""
    results: list[Result] = field(default_factory=list)
    """Behind the first draft, the first two …"""
    _num_seen: int = 0

    @property
    def num_accepted(self) -> int:
        """Drafts that have become tokens of the branch."""
        return num_equal(self.drafts, self.branch.token_ids[self.num_known :])

    def following(self) -> Result | None:
        """What the step says of the branch as it is now, if it has grown by drafts only and is not finished."""
        num_new = self.branch.num_tokens - self.num_known
        has_grown, self._num_seen = num_new > self._num_seen, num_new
        if self.branch.is_finished or not has_grown or num_new > len(self.results):
            return None
        return self.results[num_new - 1] if self.num_accepted == num_new else None
