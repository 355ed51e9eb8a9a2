"""The decoding engine: scheduler, KV cache, model runner, sampling, strategies. It knows nothing of HTTP.

Names are imported when first used: values of a request must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadenza.decoding.adapters.module import LoraModule
    from cadenza.decoding.completion import Completion
    from cadenza.decoding.config import EngineConfig
    from cadenza.decoding.engine import Engine
    from cadenza.decoding.request import (
        Delta,
        EngineClosed,
        GenerationRequest,
        PromptDone,
        QueueFull,
        RequestError,
        RequestFailed,
        SamplingParams,
        TokenExplanation,
        TokenLogprob,
    )
    from cadenza.decoding.stats import EngineStats
    from cadenza.decoding.strategies.spec import BeamSearch, BestOf, ContrastiveSearch
    from cadenza.decoding.stream import RequestStream
    from cadenza.decoding.voting.spec import SelfConsistency

_HOMES = {
    "BeamSearch": "strategies.spec",
    "BestOf": "strategies.spec",
    "Completion": "completion",
    "ContrastiveSearch": "strategies.spec",
    "Delta": "request",
    "Engine": "engine",
    "EngineClosed": "request",
    "EngineConfig": "config",
    "EngineStats": "stats",
    "GenerationRequest": "request",
    "LoraModule": "adapters.module",
    "PromptDone": "request",
    "QueueFull": "request",
    "RequestError": "request",
    "RequestFailed": "request",
    "RequestStream": "stream",
    "SamplingParams": "request",
    "SelfConsistency": "voting.spec",
    "TokenExplanation": "request",
    "TokenLogprob": "request",
}

__all__ = [
    "BeamSearch",
    "BestOf",
    "Completion",
    "ContrastiveSearch",
    "Delta",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineStats",
    "GenerationRequest",
    "LoraModule",
    "PromptDone",
    "QueueFull",
    "RequestError",
    "RequestFailed",
    "RequestStream",
    "SamplingParams",
    "SelfConsistency",
    "TokenExplanation",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cadenza.decoding.{_HOMES[name]}"), name)
