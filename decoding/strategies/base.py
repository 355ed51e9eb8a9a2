"""The protocol between one request's strategy and the engine.

A strategy owns the branches of one request. Each step brings it a `Result` for every branch whose last token was
computed; it answers by acting on its `Generation`: append a token, fork a branch, drop one, send what a branch has
to say. It never sees other requests, devices or HTTP.

Branches of one request may be computed in different steps (a preempted one comes later). A branch whose tokens are
all computed is left alone until it is given another token, so a strategy that compares its branches keeps their
results until all are there; a result may come twice, with the same values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from cadenza.decoding.branch import Branch
from cadenza.decoding.row import Candidates, Choice

if TYPE_CHECKING:
    from cadenza.decoding.generation import Generation


@dataclass(frozen=True, slots=True)
class Needs:
    """What a strategy wants of each of its rows."""

    candidates: Candidates | None = None
    """None: one token is drawn. Otherwise the most likely ones are listed."""
    hidden: bool = False
    """The last hidden states of all tokens, prompt included."""
    scores: bool = False
    """Every token's log-probability, whether or not the client wants to see it."""
    jumps: bool = True
    """Runs of tokens to which a constraint leaves no alternative may be appended without asking the model."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one step says of a branch."""

    branch: Branch
    choice: Choice
    """The token drawn; where candidates are listed, those."""
    scored: Callable[[int], Choice]
    """The same row's log-probability and explanation of another token."""
    hidden: Tensor | None = None
    """[tokens, d] last hidden states of the branch's tokens `first_hidden …` to its last; None unless needed."""
    first_hidden: int = 0


class Strategy(Protocol):
    @property
    def needs(self) -> Needs: ...

    def begin(self, stem: Branch, generation: "Generation") -> list[Branch]:
        """The prompt in `stem` is computed: the branches that get a first token from its row, `stem` and forks."""

    def advance(self, results: Sequence[Result], generation: "Generation") -> None:
        """One step's results for some of the request's branches."""
