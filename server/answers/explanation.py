"""Explanations as they go over the wire: why each token of a choice came."""

from collections.abc import Iterable
from typing import Any

from cadenza.decoding.request import TokenExplanation
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.answers.logprobs import finite


def explanation(tokenizer: Tokenizer, entries: Iterable[TokenExplanation]) -> list[dict[str, Any]]:
    """One object per token; `lost` only where other candidates were compared with it."""
    return [_entry(tokenizer, entry) for entry in entries]


def _entry(tokenizer: Tokenizer, entry: TokenExplanation) -> dict[str, Any]:
    members: dict[str, Any] = {
        "token": tokenizer.token_string(entry.token_id),
        "token_id": entry.token_id,
        "bytes": list(tokenizer.token_bytes(entry.token_id)),
        "raw_probability": entry.raw_probability,
        "final_probability": entry.final_probability,
        "rank": entry.rank,
        "entropy": entry.entropy,
        "mass_removed": entry.mass_removed,
        "decision": entry.decision,
    }
    if entry.lost:
        members["lost"] = [
            {"token": tokenizer.token_string(token_id), "token_id": token_id, "score": finite(score)}
            for token_id, score in entry.lost
        ]
    return members
