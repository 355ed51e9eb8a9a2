"""Drawing one token per row from logits: the torch reference, and what runs on a CPU.

The order is the specification. Each truncation sees the distribution that the one before it left, renormalized:

    temperature (fixed or dynamic) → top-n-sigma → epsilon → eta
        → top-k → typical-p → top-p → min-p → XTC → mirostat → draw

At least one token is left by each. Rows of temperature 0 are greedy: nothing of this applies to them.

The draw is `argmax(logit + Gumbel noise)` (Gumbel-max), which samples from the softmax exactly; the noise is a
function of (seed, branch, position, token) alone (`noise`). Rows do not influence each other, not even in the
last bit: every row is computed in a shape that only its own parameters decide.

What needs tokens in the order of their probabilities is in `truncation`, what needs no order in `thresholds`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cadenza.kernels.noise import all_words, gumbel, random_words
from cadenza.kernels.thresholds import (
    ThresholdRows,
    below_top_sigmas,
    cut_epsilon,
    cut_eta,
    cut_mirostat,
    dynamic_temperature,
    exclude_top_choices,
    xtc_applies,
)
from cadenza.kernels.truncation import most_likely

_WIDEST_NOISE = 25.8
_FEW = 8  # a word of noise by itself costs four times as much as one of four
_ALIGNMENT = 64  # elements: no number is computed as the scalar remainder of a vector, whatever is beside it
_NUM_CANDIDATES = 256
_NUM_TIES = (
    16  # that are expected of the last of the top-k, or an eighth of them: of 16-bit logits many are equal
)
ROWS_AT_ONCE = (
    8  # of whole vocabularies, whose sorted values, tokens, sums and noise take 35 times their logits
)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of R rows, each [R]. The values in parentheses turn a truncation off."""

    temperature: Tensor
    """float32; 0: greedy."""
    top_k: Tensor
    """int64 (0)."""
    top_p: Tensor
    """float32 (1)."""
    min_p: Tensor
    """float32 (0)."""
    typical_p: Tensor
    """float32 (1)."""
    seed: Tensor
    """int64, read as 64 unsigned bits."""
    branch: Tensor
    """int64."""
    position: Tensor
    """int64, the number of tokens generated before this one."""
    thresholds: ThresholdRows | None = None
    """None where no row of the batch has any."""

    def select(self, rows: Tensor) -> "SamplingRows":
        own = {
            item.name: getattr(self, item.name)[rows] for item in fields(self) if item.name != "thresholds"
        }
        return SamplingRows(
            **own, thresholds=None if self.thresholds is None else self.thresholds.select(rows)
        )

    @property
    def is_truncated(self) -> Tensor:
        """[R] bool: whether any truncation is on that wants tokens in the order of their probabilities."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0) | (self.typical_p < 1)


@dataclass(frozen=True, slots=True)
class Draws:
    tokens: Tensor
    """[R] int64."""
    surprise: Tensor | None
    """[R]: -log2 of a token's probability among those that were left, which mirostat learns from. None where no row
    has thresholds, not a number for rows without mirostat."""


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits [R, V] float32, -inf where a token is not allowed; returns token ids [R] int64."""
    return draw(logits, rows).tokens


def draw(logits: Tensor, rows: SamplingRows) -> Draws:
    """`sample`, and the surprise of what was drawn."""
    surprise = None if rows.thresholds is None else torch.full_like(logits[:, 0], torch.nan)
    greedy = rows.temperature == 0
    if greedy.all():
        return Draws(logits.argmax(dim=-1), surprise)
    tokens = torch.where(greedy, logits.argmax(dim=-1), 0) if greedy.any() else greedy.long()
    for group in survivors(logits, rows, ~greedy):
        own = rows.select(group.rows)
        if group.candidates is None:
            drawn = at = _draw_from_all(group.values, own)
        else:
            at = _draw(group.values, group.candidates, own)
            drawn = group.candidates.gather(1, at[:, None])[:, 0]
        tokens[group.rows] = drawn
        if surprise is not None:
            surprise[group.rows] = _surprise(group.values, at, own)
    return Draws(tokens, surprise)


@dataclass(frozen=True, slots=True)
class Survivors:
    """What is left of r rows for the draw."""

    rows: Tensor
    """[r], their numbers in the batch."""
    candidates: Tensor | None
    """[r, K] token ids; None: the vocabulary, in order."""
    values: Tensor
    """[r, K] scaled logits, -inf where cut off."""


def survivors(logits: Tensor, rows: SamplingRows, which: Tensor) -> Iterator[Survivors]:
    """Everything up to the draw, for the rows where `which` [R] is true. Their temperature is above 0."""
    truncated = rows.is_truncated & which
    free = which & ~truncated
    for chosen in _slices(free.nonzero().flatten()):
        own = rows.select(chosen)
        values = _finish(_begin(logits[chosen], own), None, own, logits.shape[-1])
        yield Survivors(chosen, None, values)
    if truncated.any():
        for chosen, candidates, left in truncate(logits, rows, truncated):
            values = _finish(left, candidates, rows.select(chosen), logits.shape[-1])
            yield Survivors(chosen, candidates, values)


def _slices(rows: Tensor) -> Sequence[Tensor]:
    """rows: [r]; none where there is none."""
    return rows.split(ROWS_AT_ONCE) if len(rows) else ()


def truncate(logits: Tensor, rows: SamplingRows, which: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The candidates that truncation up to min-p leaves in the rows where `which` [R] is true.

    Yields groups (rows [r], token ids [r, K], scaled logits [r, K], -inf where cut off).
    """
    vocab_size = logits.shape[-1]
    with_ties = rows.top_k + torch.maximum(rows.top_k // 8, torch.full_like(rows.top_k, _NUM_TIES))
    with_ties = (with_ties + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    widths = torch.where(rows.top_k > 0, with_ties, _NUM_CANDIDATES).clamp_max(vocab_size)
    for width in widths[which].unique().tolist():
        chosen = (which & (widths == width)).nonzero().flatten()
        own = rows.select(chosen)
        scaled = _begin(logits[chosen], own)
        candidates, values, exact = _most_likely(scaled, own, width)
        if exact.any():
            yield chosen[exact], candidates[exact], values[exact]
        for rest in _slices((~exact).nonzero().flatten()):
            candidates, values, _ = _most_likely(scaled[rest], own.select(rest), vocab_size)
            yield chosen[rest], candidates, values


def _most_likely(scaled: Tensor, rows: SamplingRows, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return most_likely(
        scaled, width, top_k=rows.top_k, typical_p=rows.typical_p, top_p=rows.top_p, min_p=rows.min_p
    )


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [r, V] / temperature [r] > 0, less a constant per row so that no temperature is too small for float32."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]


def _begin(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits [r, V]: temperature and the thresholds that come before top-k."""
    own = rows.thresholds
    if own is None:
        return divide_by_temperature(logits, rows.temperature)
    temperature = rows.temperature.clone()
    if at := _where(own.dynatemp_range > 0):
        reach, exponent = own.dynatemp_range[at], own.dynatemp_exponent[at]
        temperature[at] = dynamic_temperature(logits[at], temperature[at], reach, exponent)
    scaled = divide_by_temperature(logits, temperature)
    if at := _where(own.top_n_sigma > 0):
        scaled[at] = scaled[at].masked_fill(below_top_sigmas(logits[at], own.top_n_sigma[at]), -torch.inf)
    if at := _where(own.epsilon_cutoff > 0):
        scaled[at] = cut_epsilon(scaled[at], own.epsilon_cutoff[at])
    if at := _where(own.eta_cutoff > 0):
        scaled[at] = cut_eta(scaled[at], own.eta_cutoff[at])
    return scaled


def _finish(values: Tensor, candidates: Tensor | None, rows: SamplingRows, vocab_size: int) -> Tensor:
    """values [r, K], in place: what comes after min-p."""
    own = rows.thresholds
    if own is None:
        return values
    if at := _where(xtc_applies(own, rows.seed, rows.branch, rows.position)):
        ids = None if candidates is None else candidates[at]
        values[at] = exclude_top_choices(values[at], ids, own.xtc_threshold[at])
    if at := _where(own.mirostat > 0):
        values[at] = cut_mirostat(values[at], own.mirostat[at], own.mirostat_mu[at], vocab_size)
    return values


def _where(on: Tensor) -> list[int]:
    return on.nonzero().flatten().tolist()


def _surprise(values: Tensor, drawn: Tensor, rows: SamplingRows) -> Tensor:
    """[r]; `drawn` [r] are places in `values` [r, K]."""
    result = torch.full_like(values[:, 0], torch.nan)
    if rows.thresholds is not None and (at := _where(rows.thresholds.mirostat > 0)):
        log_probs = values[at].log_softmax(dim=-1).gather(1, drawn[at][:, None])[:, 0]
        result[at] = log_probs / -math.log(2.0)
    return result


def _draw(values: Tensor, candidates: Tensor, rows: SamplingRows) -> Tensor:
    """The places [r] of what is drawn among `candidates` [r, K]."""
    words = random_words(rows.seed[:, None], rows.branch[:, None], rows.position[:, None], candidates)
    return (values + gumbel(words)).argmax(dim=-1)


def _draw_from_all(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """scaled [r, V], 0 for each row's most likely token. Noise lies between -2.82 and 22.88: a token that is more
    than 25.8 behind can never be drawn. Under a constraint that is nearly all of them."""
    can_win = scaled >= -_WIDEST_NOISE
    is_few = can_win.sum(dim=-1) <= scaled.shape[-1] // _FEW
    tokens = torch.empty(len(scaled), dtype=torch.int64, device=scaled.device)
    for chosen, draw_rows in ((is_few, _draw_from_few), (~is_few, _draw_from_every)):
        if chosen.all():
            return draw_rows(scaled, can_win, rows)
        if chosen.any():
            at = chosen.nonzero().flatten()
            tokens[at] = draw_rows(scaled[at], can_win[at], rows.select(at))
    return tokens


def _draw_from_every(scaled: Tensor, can_win: Tensor, rows: SamplingRows) -> Tensor:
    words = all_words(rows.seed, rows.branch, rows.position, scaled.shape[-1])
    return (scaled + gumbel(words)).argmax(dim=-1)


def _draw_from_few(scaled: Tensor, can_win: Tensor, rows: SamplingRows) -> Tensor:
    """The same draw among the tokens where `can_win` [r, V], side by side in rows of equal length."""
    counts = can_win.sum(dim=-1)
    width = -(-max(int(counts.max()), 1) // _ALIGNMENT) * _ALIGNMENT
    row, token = can_win.nonzero(as_tuple=True)
    place = torch.arange(len(token), device=token.device) - (counts.cumsum(0) - counts)[row]
    candidates = torch.zeros(len(scaled), width, dtype=torch.int64, device=scaled.device)
    values = torch.full((len(scaled), width), -torch.inf, device=scaled.device)
    candidates[row, place] = token
    values[row, place] = scaled[row, token]
    return candidates.gather(1, _draw(values, candidates, rows)[:, None])[:, 0]
