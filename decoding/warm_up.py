"""Kernels compiled before the first request, which would wait for them.

Most of the model's layers were compiled for when `probe` tried it, with a few tokens; quantized ones compute other
numbers of rows by other kernels. Knows rows and layers; no requests.
"""

import torch
from torch import nn

from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Candidates, Row
from cadenza.models.linear import computing_layers
from cadenza.models.quantization.base import QuantizedLinear

_ROW_COUNTS = (1, 17, 65)
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


@torch.inference_mode()
def warm_up_layers(module: nn.Module, device: torch.device) -> None:
    """Every shape of quantized layers, with as many rows as there are kernels for. Layers that wait elsewhere are left
    out."""
    seen: set[object] = set()
    for layer in computing_layers(module):
        if not isinstance(layer, QuantizedLinear) or not layer.is_prepared:
            continue
        shape = (type(layer), layer.in_features, layer.out_features, layer.bias is None, layer.operator)
        if shape not in seen:
            seen.add(shape)
            for count in _ROW_COUNTS:
                layer(torch.zeros(count, layer.in_features, dtype=layer.dtype, device=device))


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
