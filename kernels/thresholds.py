"""Truncations that compare each token with a threshold of its own row, so that no vocabulary is sorted for them.

    top-n-sigma   Tang et al. 2024, "Top-nσ: not all logits are you need"
    epsilon, eta  Hewitt et al. 2022, "Truncation sampling as language model desmoothing"; as transformers has them
    XTC           "exclude top choices", as llama.cpp has it
    mirostat      Basu et al. 2021, "Mirostat: a neural text decoding algorithm"; 1 and 2 as llama.cpp has them
    dynatemp      llama.cpp's temperature that follows the entropy; no truncation, but of the same kind

Rows are [r, K] float32 with -inf where a token is cut off, and at least one token is left in each. A row's result
does not depend on the rows beside it, not in the last bit: hence `row_sums` and the scalar arithmetic. Knows numbers
only: when to apply what is `sampling`'s.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from cadenza.kernels.noise import uniform

_PIECE = 512
_SMALLEST = torch.finfo(torch.float32).tiny
_NUM_ESTIMATED = 100  # most likely tokens that tell mirostat 1 the exponent of Zipf's law, as in llama.cpp
_HIGHEST_XTC_THRESHOLD = 0.5  # two tokens cannot both have more


@dataclass(frozen=True, slots=True)
class ThresholdRows:
    """Parameters of R rows, each [R]; float32, but for `mirostat`. 0 turns off what bears no other remark."""

    dynatemp_range: Tensor
    dynatemp_exponent: Tensor
    """Only with a range."""
    top_n_sigma: Tensor
    epsilon_cutoff: Tensor
    eta_cutoff: Tensor
    xtc_probability: Tensor
    xtc_threshold: Tensor
    """Above 0.5: off."""
    mirostat: Tensor
    """int64: 0, 1 or 2."""
    mirostat_mu: Tensor
    """The largest surprise that is allowed, in bits."""

    def select(self, rows: Tensor) -> "ThresholdRows":
        return ThresholdRows(*(getattr(self, item.name)[rows] for item in fields(self)))


def row_sums(values: Tensor) -> Tensor:
    """[r, K] → [r]. `values.sum(-1)` adds a single long row in as many parts as there are threads, and several
    rows each from end to end."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % _PIECE))
    pieces: Tensor = padded.unflatten(-1, (-1, _PIECE)).sum(dim=-1)
    return pieces.sum(dim=-1)


def entropy(log_probs: Tensor) -> Tensor:
    """[r], in nats."""
    return row_sums(torch.where(log_probs.isneginf(), 0.0, -log_probs * log_probs.exp()))


def dynamic_temperature(logits: Tensor, temperature: Tensor, reach: Tensor, exponent: Tensor) -> Tensor:
    """[r]: from temperature - reach where one token is certain, to temperature + reach where all are equally likely.

    In between by (entropy / the largest entropy) ** exponent; the largest is that of the tokens allowed in the row.
    """
    counts = (logits > -torch.inf).sum(dim=-1).tolist()
    columns = (entropy(logits.log_softmax(dim=-1)), temperature, reach, exponent)
    found = []
    for count, nats, middle, distance, power in zip(
        counts, *(column.tolist() for column in columns), strict=True
    ):
        lowest = max(0.0, middle - distance)
        share = min(max(nats, 0.0) / math.log(count), 1.0) if count > 1 else 0.0
        found.append(lowest + (middle + distance - lowest) * share**power)
    return torch.tensor(found, dtype=torch.float32, device=logits.device).clamp_min(_SMALLEST)


def below_top_sigmas(logits: Tensor, num_sigmas: Tensor) -> Tensor:
    """[r, K] bool: more than `num_sigmas` standard deviations below the largest logit.

    Mean and deviation are of the allowed tokens. Dividing logits by a temperature changes nothing in this.
    """
    allowed = logits > -torch.inf
    counts = allowed.sum(dim=-1)
    largest = logits.amax(dim=-1, keepdim=True)
    below = torch.where(allowed, largest - logits, 0.0)
    mean = row_sums(below) / counts
    deviation = torch.where(allowed, below - mean[:, None], 0.0)
    sigma = (row_sums(deviation * deviation) / counts).sqrt()
    return below > (num_sigmas * sigma)[:, None]


def cut_epsilon(values: Tensor, epsilon: Tensor) -> Tensor:
    """Keep probabilities of at least `epsilon`."""
    return _cut(values, values.softmax(dim=-1) < epsilon[:, None])


def cut_eta(values: Tensor, epsilon: Tensor) -> Tensor:
    """Keep probabilities of at least min(epsilon, sqrt(epsilon) * exp(-entropy)), compared as logarithms."""
    log_probs = values.log_softmax(dim=-1)
    log_epsilon = torch.tensor([math.log(each) for each in epsilon.tolist()], device=values.device)
    eta = torch.minimum(log_epsilon, 0.5 * log_epsilon - entropy(log_probs))
    return _cut(values, log_probs < eta[:, None])


def _cut(values: Tensor, unwanted: Tensor) -> Tensor:
    """-inf where unwanted; the most likely tokens stay."""
    return values.masked_fill(unwanted & (values < values.amax(dim=-1, keepdim=True)), -torch.inf)


def xtc_applies(rows: ThresholdRows, seed: Tensor, branch: Tensor, position: Tensor) -> Tensor:
    """[R] bool: the coin of each row, thrown once per token."""
    on = (rows.xtc_probability > 0) & (rows.xtc_threshold <= _HIGHEST_XTC_THRESHOLD)
    return on & (uniform(seed, branch, position) < rows.xtc_probability) if on.any() else on


def exclude_top_choices(values: Tensor, token_ids: Tensor | None, threshold: Tensor) -> Tensor:
    """Of the tokens with a probability of at least `threshold` only the least likely stays: of equally likely ones
    that of the lowest id. token_ids: [r, K], or None where tokens are in order.

    The largest result is 0, as the draw expects.
    """
    probs = values.softmax(dim=-1)
    is_top = (probs >= threshold[:, None]) & (values > -torch.inf)
    least = values.masked_fill(~is_top, torch.inf).amin(dim=-1, keepdim=True)
    if token_ids is None:
        token_ids = torch.arange(values.shape[-1], device=values.device)[None, :]
    beyond = torch.iinfo(torch.int64).max
    kept_id = torch.where(is_top & (values == least), token_ids, beyond).amin(dim=-1, keepdim=True)
    left = values.masked_fill(is_top & (token_ids != kept_id), -torch.inf)
    return left - left.amax(dim=-1, keepdim=True)


def cut_mirostat(values: Tensor, version: Tensor, mu: Tensor, vocab_size: int) -> Tensor:
    """Rows of either version of mirostat."""
    result = _cut_surprising(values, mu)
    for row in (version == 1).nonzero().flatten().tolist():
        result[row] = _cut_by_zipf(values[row], float(mu[row]), vocab_size)
    return result


def _cut_surprising(values: Tensor, mu: Tensor) -> Tensor:
    """Mirostat 2: no surprise above mu. Where all are, the most likely token stays, of equal ones the first."""
    kept = values.log_softmax(dim=-1) >= (-math.log(2.0) * mu)[:, None]
    kept.scatter_(1, values.argmax(dim=-1, keepdim=True), True)
    return values.masked_fill(~kept, -torch.inf)


def _cut_by_zipf(values: Tensor, mu: float, vocab_size: int) -> Tensor:
    """Mirostat 1 for a row [K]: the k most likely tokens, k such that mu is the surprise to expect under Zipf's law."""
    num_left = int((values > -torch.inf).sum())
    if num_left <= 1:
        return values
    num_kept = _zipf_rank(
        values.topk(min(_NUM_ESTIMATED, num_left)).values.tolist(), mu, vocab_size, num_left
    )
    kept = values.topk(num_kept).indices
    return torch.full_like(values, -torch.inf).index_copy_(0, kept, values[kept])


def _zipf_rank(largest: list[float], mu: float, vocab_size: int, num_left: int) -> int:
    """The paper's k for the logits of the most likely tokens, at least 1 and at most `num_left`."""
    steps = [math.log((rank + 2) / (rank + 1)) for rank in range(len(largest) - 1)]
    falls = [one - next_one for one, next_one in pairwise(largest)]
    exponent = sum(t * b for t, b in zip(steps, falls, strict=True)) / sum(t * t for t in steps)
    excess = exponent - 1.0
    if abs(excess) < 1e-9:
        factor = 1.0 / math.log(vocab_size)
    else:
        factor = excess / -math.expm1(-excess * math.log(vocab_size))
    scale = math.log(factor) + mu * math.log(2.0)
    if exponent <= 0.0:  # all equally likely
        return num_left if scale > 0.0 else 1
    return max(1, min(num_left, int(math.exp(min(scale / exponent, math.log(num_left) + 1.0)))))
