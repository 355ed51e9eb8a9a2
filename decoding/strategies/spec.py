"""Which strategy a request asks for, as plain frozen values. Knows no tensors, no branches, no HTTP.

Construction checks every range and raises `RequestError` naming the field as the API calls it. A request without
a spec is decoded greedily or sampled, n choices that know nothing of each other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cadenza.decoding.request import RequestError, SamplingParams
from cadenza.decoding.voting.spec import SelfConsistency

EarlyStopping = bool | Literal["never"]


def _require(ok: bool, param: str, rule: str, value: object) -> None:
    if not ok:
        raise RequestError(f"{param} must be {rule}, got {value!r}", param)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
    """Beam search as transformers defines it; with several groups, diverse beam search (Vijayakumar et al. 2018)."""

    num_beams: int
    length_penalty: float = 1.0
    """Scores are divided by length ** length_penalty: above 0 favours longer answers."""
    early_stopping: EarlyStopping = False
    """True: as soon as num_beams hypotheses are complete. False: when no live beam is likely to do better.
    "never": when none can."""
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        _require(self.num_beams >= 1, "num_beams", "at least 1", self.num_beams)
        _require(math.isfinite(self.length_penalty), "length_penalty", "a finite number", self.length_penalty)
        _require(self.num_beam_groups >= 1, "num_beam_groups", "at least 1", self.num_beam_groups)
        divides = self.num_beams % self.num_beam_groups == 0
        _require(
            divides, "num_beam_groups", f"a divisor of num_beams ({self.num_beams})", self.num_beam_groups
        )
        is_fine = math.isfinite(self.diversity_penalty) and self.diversity_penalty >= 0
        _require(is_fine, "diversity_penalty", "at least 0", self.diversity_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveSearch:
    """Contrastive search (Su et al. 2022) as transformers defined it."""

    penalty_alpha: float
    top_k: int

    def __post_init__(self) -> None:
        _require(0 < self.penalty_alpha <= 1, "penalty_alpha", "above 0 and at most 1", self.penalty_alpha)
        _require(self.top_k >= 2, "top_k", "at least 2 with penalty_alpha", self.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """Sample `best_of` answers, return those `n` of highest cumulative log-probability."""

    best_of: int

    def __post_init__(self) -> None:
        _require(1 <= self.best_of <= 128, "best_of", "between 1 and 128", self.best_of)


StrategySpec = BeamSearch | ContrastiveSearch | BestOf | SelfConsistency


def check_search(sampling: SamplingParams, what: str) -> None:
    """Raise RequestError for sampling parameters that mean nothing where tokens are searched for, not drawn."""
    neutral = SamplingParams()
    if sampling.temperature not in (0.0, 1.0):
        raise RequestError(f"temperature must be 0 or 1 with {what}: nothing is drawn", "temperature")
    for name in DRAWING_FIELDS:
        if getattr(sampling, name) not in (getattr(neutral, name), _ALSO_OFF.get(name)):
            raise RequestError(f"{name} cannot be combined with {what}: nothing is drawn", name)


def is_search(spec: StrategySpec | None) -> bool:
    """Whether tokens are searched for, so that nothing is drawn."""
    return isinstance(spec, BeamSearch | ContrastiveSearch)


def search_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own sampling defaults, less those that mean nothing to a search."""
    return {
        name: value
        for name, value in defaults.items()
        if name != "temperature" and name not in DRAWING_FIELDS
    }


DRAWING_FIELDS: Final = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "top_n_sigma",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc_probability",
    "xtc_threshold",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "dynatemp_range",
    "dynatemp_exponent",
)
"""Fields of `SamplingParams` that only change a draw, beside temperature."""
_ALSO_OFF: Final = {"top_k": -1, "top_n_sigma": -1.0}
