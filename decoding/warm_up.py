"""Kernels of the logits pipeline compiled before the first request, which would wait for them.

Those of the model's layers were compiled when `probe` tried it. Knows rows; no models, no requests.
"""

import torch

from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Candidates, Row

_MOST_LISTED = 20
"""Alternatives that OpenAI's API allows."""
_NUM_CANDIDATES = 8
"""Of four beams."""


def warm_up(pipeline: LogitsPipeline, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Chooses from zeros in the ways that requests commonly ask for. Kernels of others (wider searches) are compiled
    when they come. num_columns: of the logits."""
    logits = torch.zeros(1, num_columns, dtype=dtype, device=device)
    bitmask = torch.full((1, -(-num_columns // 32)), -1, dtype=torch.int32)
    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)
    beam = Candidates(_NUM_CANDIDATES, normalized=False)
    for rows in (
        [_row(greedy)],
        [_row(drawn, banned=[0])],
        [_row(drawn, mask=0, banned=[0]), _row(drawn, num_logprobs=1)],
        [_row(drawn, num_logprobs=_MOST_LISTED)],
        [_row(greedy, candidates=beam)],
        [_row(greedy, candidates=beam, mask=0)],
    ):
        pipeline(logits, rows, bitmask if rows[0].mask is not None else None)


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
