"""The ends of what a request may ask for: nearly no temperature is greedy, an enormous one is uniform."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from cadenza.kernels.sampling import SamplingRows, sample

TRUNCATIONS: dict[str, dict[str, float]] = {
    "none": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.9},
}


def rows_of(count: int, temperature: float, truncation: dict[str, float]) -> SamplingRows:
    def column(name: str, off: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), truncation.get(name, off), dtype=dtype)

    return SamplingRows(
        temperature=torch.full((count,), temperature, dtype=torch.float32),
        top_k=column("top_k", 0, torch.int64),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        typical_p=column("typical_p", 1.0, torch.float32),
        seed=torch.zeros(count, dtype=torch.int64),
        branch=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(count),
    )


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37, 1e-38, 1e-40, 1e-45, 1e-300])
def test_nearly_no_temperature_is_greedy(temperature: float, truncation: str):
    """1e-40 is not a normal float32, and logits divided by 1e-38 are beyond one; 1e-300 is zero."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1)) * 5
    logits[::4] = -torch.inf
    tokens = sample(logits.expand(8, -1), rows_of(8, temperature, TRUNCATIONS[truncation]))
    assert tokens.tolist() == [int(logits.argmax())] * 8


def test_an_enormous_temperature_is_uniform():
    """A correct sampler fails this with probability 1e-4; the seed is fixed."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(1)) * 5
    tokens = sample(logits.expand(4000, -1), rows_of(4000, 1e30, {"top_k": 10}))
    assert stats.chisquare(torch.bincount(tokens, minlength=10).numpy()).pvalue > 1e-4
