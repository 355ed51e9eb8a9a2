"""Kernels of the logits pipeline compiled before the first request, which would wait for them.

Those of the model's layers were compiled when `probe` tried it. Knows rows; no models, no requests.
"""

import torch

from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Candidates, Row

_NUM_LISTED = 5
_NUM_BEAMS = 4


def warm_up(pipeline: LogitsPipeline, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Chooses from zeros, once in each of the ways that kernels are specialized for. num_columns: of the logits."""
    logits = torch.zeros(1, num_columns, dtype=dtype, device=device)
    bitmask = torch.full((1, -(-num_columns // 32)), -1, dtype=torch.int32)
    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)
    pipeline(logits, [_row(greedy)], None)
    pipeline(logits, [_row(drawn, mask=0, banned=[0]), _row(drawn, num_logprobs=_NUM_LISTED)], bitmask)
    pipeline(logits, [_row(greedy, candidates=Candidates(2 * _NUM_BEAMS, normalized=False))], None)


def _row(
    sampling: SamplingParams,
    *,
    mask: int | None = None,
    banned: list[int] | None = None,
    num_logprobs: int | None = None,
    candidates: Candidates | None = None,
) -> Row:
    return Row(
        logits_row=0,
        sampling=sampling,
        seed=0,
        branch=0,
        prompt=(),
        generated=(),
        banned=banned or (),
        num_logprobs=num_logprobs,
        mask=mask,
        candidates=candidates,
    )
