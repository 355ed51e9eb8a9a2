"""What a request says of its vote, as plain frozen values. Knows no tensors, no branches, no HTTP."""

import math
from dataclasses import dataclass
from typing import Literal

from cadenza.decoding.request import RequestError
from cadenza.decoding.voting.answer import AnswerRule

Weight = Literal["count", "logprob"]

MAX_SAMPLES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfConsistency:
    """Sample several answers and return the one that most of them agree on (Wang et al. 2022)."""

    n: int
    """Samples, if the vote is not decided before."""
    answer: AnswerRule
    """Where in its text a sample answers."""
    weight: Weight = "count"
    """What a vote weighs: 1, or exp of the mean log-probability of the sample's tokens."""
    stop_when_decided: bool = True
    """Begin no more samples when none that is left could change the winner."""
    min_samples: int = 1
    confidence: float | None = None
    """Stop as soon as the leader is the more common answer with this probability (Aggarwal et al. 2023), although the
    other samples might have changed the winner."""

    def __post_init__(self) -> None:
        _require(1 <= self.n <= MAX_SAMPLES, "n", f"between 1 and {MAX_SAMPLES}", self.n)
        _require(self.weight in ("count", "logprob"), "weight", "count or logprob", self.weight)
        _require(
            1 <= self.min_samples <= self.n, "min_samples", f"between 1 and n ({self.n})", self.min_samples
        )
        if self.confidence is None:
            return
        is_fine = math.isfinite(self.confidence) and 0.5 < self.confidence < 1
        _require(is_fine, "confidence", "above 0.5 and below 1", self.confidence)
        if not self.stop_when_decided:
            param = "self_consistency.confidence"
            raise RequestError(f"{param} stops early, which stop_when_decided: false forbids", param)


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        param = f"self_consistency.{name}"
        raise RequestError(f"{param} must be {rule}, got {value!r}", param)
