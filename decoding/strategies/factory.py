"""From a request to the strategy that serves it."""

from cadenza.decoding.config import EngineConfig
from cadenza.decoding.request import GenerationRequest, RequestError
from cadenza.decoding.strategies.base import Strategy
from cadenza.decoding.strategies.beam import BeamBranches, check_beam_search
from cadenza.decoding.strategies.best_of import RankedBranches
from cadenza.decoding.strategies.contrastive import ContrastiveBranches
from cadenza.decoding.strategies.independent import IndependentBranches
from cadenza.decoding.strategies.room import Room
from cadenza.decoding.strategies.self_consistency import VotingBranches
from cadenza.decoding.strategies.spec import BeamSearch, BestOf, ContrastiveSearch, check_search
from cadenza.decoding.voting.spec import SelfConsistency


def strategy_of(request: GenerationRequest, max_tokens: int, config: EngineConfig, room: Room) -> Strategy:
    """Raises RequestError where the request's other fields, or the engine's size, exclude its strategy."""
    num_prompt = len(request.prompt_token_ids)
    match request.strategy:
        case None:
            return IndependentBranches(request.sampling.n)
        case BeamSearch() as spec:
            check_beam_search(spec, request.sampling, config.max_num_seqs)
            room.check("num_beams", spec.num_beams, num_prompt, max_tokens)
            return BeamBranches(spec, request.sampling.n)
        case ContrastiveSearch() as spec:
            room.check("top_k", spec.top_k, num_prompt + max_tokens, 1)
            return _contrastive(spec, request, config)
        case BestOf() as spec:
            return _best_of(spec, request)
        case SelfConsistency() as spec:
            return _vote(spec, request)
        case other:
            raise NotImplementedError(f"{type(other).__name__}")


def _contrastive(spec: ContrastiveSearch, request: GenerationRequest, config: EngineConfig) -> Strategy:
    check_search(request.sampling, "contrastive search (penalty_alpha)")
    if request.sampling.n != 1:
        raise RequestError(f"n must be 1 with penalty_alpha, got {request.sampling.n}", "n")
    if spec.top_k > config.max_num_seqs:
        raise RequestError(
            f"top_k must be at most {config.max_num_seqs} with penalty_alpha (the server's max_num_seqs:"
            f" that many candidates are computed together), got {spec.top_k}",
            "top_k",
        )
    return ContrastiveBranches(spec)


def _best_of(spec: BestOf, request: GenerationRequest) -> Strategy:
    if spec.best_of < request.sampling.n:
        raise RequestError(
            f"best_of must be at least n ({request.sampling.n}), got {spec.best_of}", "best_of"
        )
    return RankedBranches(spec, request.sampling.n)


def _vote(spec: SelfConsistency, request: GenerationRequest) -> Strategy:
    if request.sampling.n != 1:
        raise RequestError(
            f"n must be 1 with self_consistency, which has an n of its own, got {request.sampling.n}", "n"
        )
    if request.sampling.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1 with self_consistency", "max_tokens")
    return VotingBranches(spec)
