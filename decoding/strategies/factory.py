"""From a request to the strategy that serves it."""

from cadenza.decoding.config import EngineConfig
from cadenza.decoding.request import GenerationRequest
from cadenza.decoding.strategies.base import Strategy
from cadenza.decoding.strategies.independent import IndependentBranches


def strategy_of(request: GenerationRequest, config: EngineConfig) -> Strategy:
    """Raises RequestError where the request's other fields, or the engine's size, exclude its strategy."""
    match request.strategy:
        case None:
            return IndependentBranches(request.sampling.n)
        case other:
            raise NotImplementedError(f"{type(other).__name__}")
