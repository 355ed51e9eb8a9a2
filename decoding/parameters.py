"""The parameters of a batch's rows as the small tensors that the sampling kernel reads, and mirostat's feedback."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cadenza.decoding.row import Row
from cadenza.kernels.sampling import SamplingRows
from cadenza.kernels.thresholds import ThresholdRows

_LARGEST_TOP_K = 2**31 - 1
"""More than any vocabulary: whatever a request says, it can be computed with."""


def sampling_rows(rows: Sequence[Row], device: torch.device) -> SamplingRows:
    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    return SamplingRows(
        temperature=column((row.sampling.temperature for row in rows), torch.float32),
        top_k=column((min(max(row.sampling.top_k, 0), _LARGEST_TOP_K) for row in rows), torch.int64),
        top_p=column((row.sampling.top_p for row in rows), torch.float32),
        min_p=column((row.sampling.min_p for row in rows), torch.float32),
        typical_p=column((row.sampling.typical_p for row in rows), torch.float32),
        seed=column((as_signed(row.seed) for row in rows), torch.int64),
        branch=column((row.branch for row in rows), torch.int64),
        position=column((len(row.generated) for row in rows), torch.int64),
        thresholds=_thresholds(rows, device) if any(row.sampling.has_thresholds for row in rows) else None,
    )


def _thresholds(rows: Sequence[Row], device: torch.device) -> ThresholdRows:
    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)

    params = [row.sampling for row in rows]
    return ThresholdRows(
        dynatemp_range=column(each.dynatemp_range for each in params),
        dynatemp_exponent=column(each.dynatemp_exponent for each in params),
        top_n_sigma=column(each.top_n_sigma for each in params),
        epsilon_cutoff=column(each.epsilon_cutoff for each in params),
        eta_cutoff=column(each.eta_cutoff for each in params),
        xtc_probability=column(each.xtc_probability for each in params),
        xtc_threshold=column(each.xtc_threshold for each in params),
        mirostat=torch.tensor([each.mirostat for each in params], device=device),
        mirostat_mu=column(map(_mu, rows)),
    )


def next_mu(rows: Sequence[Row], surprise: Tensor | None) -> list[float | None]:
    """Mirostat's feedback: less surprise is allowed after a token of more than tau bits, more after one of less."""
    if surprise is None:
        return [None] * len(rows)
    return [
        _mu(row) - row.sampling.mirostat_eta * (bits - row.sampling.mirostat_tau)
        if row.sampling.is_stateful
        else None
        for row, bits in zip(rows, surprise.tolist(), strict=True)
    ]


def _mu(row: Row) -> float:
    return 2.0 * row.sampling.mirostat_tau if row.mirostat_mu is None else row.mirostat_mu


def as_signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
