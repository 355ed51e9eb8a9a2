"""What the engine asks of whoever drafts tokens. A wrong draft costs time, never a result.

Knows branches and steps; not who accepts drafts, nor how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cadenza.decoding.branch import Branch

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation
    from cadenza.decoding.scheduler import Step

Owners = Mapping[Branch, "Generation"]

_MEMORY = 0.9  # how much of what is known is still believed after another draft


@dataclass(frozen=True, slots=True)
class Wish:
    """So many tokens could be drafted, each of them right with this probability if those before it are."""

    num_tokens: int
    acceptance: float
    cost: float = 0.0
    """Of drafting one of them, in the units of `StepCost`."""


class Drafter(Protocol):
    def wish(self, branch: Branch, limit: int) -> Wish | None:
        """How many tokens, at most `limit`, to draft for a branch that is about to be given its next token."""

    def propose(self, step: "Step", room: Mapping[Branch, int], owners: Owners) -> dict[Branch, list[int]]:
        """Called in every step, before the model runs: drafts for branches of `room`, at most so many each."""

    def forget(self, branch: Branch) -> None:
        """The branch is no more."""


@dataclass(slots=True)
class Trust:
    """How often guesses came true lately."""

    num_right: float
    num_judged: float

    @property
    def acceptance(self) -> float:
        return self.num_right / self.num_judged

    def learn(self, guess: Sequence[int], came: Sequence[int]) -> None:
        """The first wrong token of a guess ends it: those behind it cannot be judged."""
        if not guess or not came:
            return
        num_right = num_equal(guess, came)
        is_wrong = num_right < min(len(guess), len(came))
        self.num_right = self.num_right * _MEMORY + num_right
        self.num_judged = self.num_judged * _MEMORY + num_right + is_wrong


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common beginning."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)
