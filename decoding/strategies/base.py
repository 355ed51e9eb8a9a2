"""The protocol between one request's strategy and the engine.

A strategy owns the branches of one request. It never sees logits, other requests, devices or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cadenza.decoding.branch import Branch
from cadenza.decoding.logits import Choice


@dataclass(frozen=True, slots=True)
class Append:
    """The branch grows by the chosen token."""

    branch: Branch
    choice: Choice


class Strategy(Protocol):
    def begin(self, root: Branch) -> list[Branch]:
        """The prompt is computed: the branches that get a first token, forks of `root` and `root` itself."""

    def advance(self, results: Sequence[tuple[Branch, Choice]]) -> list[Append]:
        """One step's choices for the request's branches, and what to do about them."""
