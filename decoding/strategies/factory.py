"""From a request to the strategy that serves it."""

from cadenza.decoding.config import EngineConfig
from cadenza.decoding.request import GenerationRequest, RequestError
from cadenza.decoding.strategies.base import Strategy
from cadenza.decoding.strategies.beam import BeamBranches, check_beam_search
from cadenza.decoding.strategies.independent import IndependentBranches
from cadenza.decoding.strategies.self_consistency import VotingBranches
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.decoding.voting.spec import SelfConsistency


def strategy_of(request: GenerationRequest, config: EngineConfig) -> Strategy:
    """Raises RequestError where the request's other fields, or the engine's size, exclude its strategy."""
    match request.strategy:
        case None:
            return IndependentBranches(request.sampling.n)
        case BeamSearch() as spec:
            check_beam_search(spec, request.sampling, config.max_num_seqs)
            return BeamBranches(spec, request.sampling.n)
        case SelfConsistency() as spec:
            return _vote(spec, request)
        case other:
            raise NotImplementedError(f"{type(other).__name__}")


def _vote(spec: SelfConsistency, request: GenerationRequest) -> Strategy:
    if request.sampling.n != 1:
        raise RequestError(
            f"n must be 1 with self_consistency, which has an n of its own, got {request.sampling.n}", "n"
        )
    if request.sampling.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1 with self_consistency", "max_tokens")
    return VotingBranches(spec)
