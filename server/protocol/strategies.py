"""The ways to ask for a decoding strategy: vLLM's, transformers' and our own fields, as one `StrategySpec`.

Checks that there is at most one strategy and that options have one to apply to; ranges are the spec's to check, and
what a strategy needs of the model and the engine is checked on admission.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Annotated, Any, Final

from pydantic import PlainValidator

from cadenza.decoding.request import RequestError
from cadenza.decoding.strategies.spec import (
    BeamSearch,
    BestOf,
    ContrastiveSearch,
    EarlyStopping,
    StrategySpec,
)
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.server.protocol.voting import SelfConsistencyFields
from cadenza.server.protocol.wire import Wire

Way = tuple[str, Callable[[], StrategySpec]]
"""A field that asks for a strategy, and the strategy."""

_BEAM_OPTIONS: Final[dict[str, object]] = {
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
"""With the values that ask for nothing."""


def _early_stopping(value: Any) -> EarlyStopping:
    if isinstance(value, bool):
        return value
    if value == "never":
        return "never"
    raise ValueError('must be true, false or "never".')


class StrategyFields(Wire):
    n: int = 1
    top_k: int | None = None
    use_beam_search: bool = False
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: Annotated[EarlyStopping | None, PlainValidator(_early_stopping)] = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    penalty_alpha: float | None = None
    self_consistency: SelfConsistencyFields | None = None
    explain: bool = False

    @cached_property
    def strategy(self) -> StrategySpec | None:
        """The one strategy that the body asks for. Raises RequestError where that is not clear."""
        ways = list(self._strategies())
        if len(ways) > 1:
            raise _error(ways[1][0], f"excludes {ways[0][0]}: a request has at most one strategy")
        spec = ways[0][1]() if ways else None
        if not isinstance(spec, BeamSearch):
            self._refuse_beam_options()
        return spec

    @property
    def ends_together(self) -> bool:
        """Which texts are returned is known when the last one ends: there may then be fewer than `n`."""
        return isinstance(self.strategy, BeamSearch | BestOf | SelfConsistency)

    @property
    def strategy_renamed(self) -> dict[str, str]:
        """What the engine calls one of our fields, where that differs from what this client called it."""
        return {"num_beams": "n"} if self.use_beam_search and self.num_beams is None else {}

    def _strategies(self) -> Iterator[Way]:
        if self.use_beam_search:
            yield "use_beam_search", self._beam_search
        elif self.num_beams not in (None, 1):
            yield "num_beams", self._beam_search
        if self.penalty_alpha not in (None, 0.0):
            yield "penalty_alpha", self._contrastive_search
        if self.self_consistency is not None:
            yield "self_consistency", self._self_consistency

    def _beam_search(self) -> BeamSearch:
        width = self.n if self.num_beams is None else self.num_beams
        if self.use_beam_search and width != self.n:
            raise _error("num_beams", f"must be n ({self.n}) with use_beam_search, got {width}")
        groups = 1 if self.num_beam_groups is None else self.num_beam_groups
        diversity = 0.0 if self.diversity_penalty is None else self.diversity_penalty
        early_stopping: EarlyStopping = False if self.early_stopping is None else self.early_stopping
        spec = BeamSearch(
            num_beams=width,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=early_stopping,
            num_beam_groups=groups,
            diversity_penalty=diversity,
        )
        if self.n > width:
            raise _error("n", f"must be at most num_beams ({width}), got {self.n}")
        if groups > 1 and diversity == 0.0:
            raise _error(
                "diversity_penalty", "must be above 0 with num_beam_groups: else all groups are the same"
            )
        if groups == 1 and diversity != 0.0:
            raise _error("diversity_penalty", "needs num_beam_groups above 1")
        return spec

    def _refuse_beam_options(self) -> None:
        for name, neutral in _BEAM_OPTIONS.items():
            if getattr(self, name) not in (None, neutral):
                raise _error(name, "needs beam search: num_beams above 1, or use_beam_search")

    def _contrastive_search(self) -> ContrastiveSearch:
        assert self.penalty_alpha is not None
        if self.top_k is None:
            raise _error("top_k", "is needed with penalty_alpha: the number of candidates")
        if self.n != 1:
            raise _error("n", f"must be 1 with penalty_alpha, got {self.n}")
        return ContrastiveSearch(penalty_alpha=self.penalty_alpha, top_k=self.top_k)

    def _self_consistency(self) -> SelfConsistency:
        assert self.self_consistency is not None
        if self.n != 1:
            raise _error("n", f"must be 1 with self_consistency, which has an n of its own, got {self.n}")
        return self.self_consistency.spec


def _error(param: str, rule: str) -> RequestError:
    return RequestError(f"{param} {rule}.", param)
