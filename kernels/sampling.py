"""Drawing one token per row from logits: the torch reference, and what runs on a CPU.

The order is the specification. Each truncation sees the distribution that the one before it left, renormalized:

    temperature → top-k → typical-p → top-p → min-p → draw

The draw is `argmax(logit + Gumbel noise)` (Gumbel-max), which samples from the softmax exactly; the noise is a
function of (seed, branch, position, token) alone (`noise`). Rows do not influence each other, not even in the
last bit: every row is computed in a shape that only its own parameters decide.

The vocabulary is never sorted where the `_NUM_CANDIDATES` most likely tokens prove to be enough.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cadenza.kernels.noise import all_words, gumbel, random_words

_WIDEST_NOISE = 25.8
_FEW = 8  # a word of noise by itself costs four times as much as one of four
_ALIGNMENT = 64  # elements: no number is computed as the scalar remainder of a vector, whatever is beside it
_NUM_CANDIDATES = 256


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

    def select(self, rows: Tensor) -> "SamplingRows":
        return SamplingRows(*(getattr(self, item.name)[rows] for item in fields(self)))

    @property
    def is_truncated(self) -> Tensor:
        """[R] bool: whether any truncation is on."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0) | (self.typical_p < 1)


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """logits [R, V] float32, -inf where a token is not allowed; returns token ids [R] int64."""
    greedy = rows.temperature == 0
    if greedy.all():
        return logits.argmax(dim=-1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), 0) if greedy.any() else greedy.long()
    truncated = rows.is_truncated & ~greedy
    free = ~truncated & ~greedy
    if free.any():
        chosen = free.nonzero().flatten()
        own = rows.select(chosen)
        tokens[chosen] = _draw_from_all(divide_by_temperature(logits[chosen], own.temperature), own)
    if truncated.any():
        for chosen, candidates, values in truncate(logits, rows, truncated):
            tokens[chosen] = _draw(values, candidates, rows.select(chosen))
    return tokens


def truncate(logits: Tensor, rows: SamplingRows, which: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The candidates that truncation leaves in the rows where `which` [R] is true.

    Returns groups (rows [r], token ids [r, K], scaled logits [r, K], -inf where cut off).
    """
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    vocab_size = logits.shape[-1]
    widths = torch.where(rows.top_k > 0, rows.top_k, _NUM_CANDIDATES).clamp_max(vocab_size)
    for width in widths[which].unique().tolist():
        chosen = (which & (widths == width)).nonzero().flatten()
        own = rows.select(chosen)
        scaled = divide_by_temperature(logits[chosen], own.temperature)
        candidates, values, exact = _truncate(scaled, own, width)
        if exact.all():
            groups.append((chosen, candidates, values))
            continue
        if exact.any():
            groups.append((chosen[exact], candidates[exact], values[exact]))
        rest = ~exact
        candidates, values, _ = _truncate(scaled[rest], own.select(rest), vocab_size)
        groups.append((chosen[rest], candidates, values))
    return groups


def divide_by_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [r, V] / temperature [r] > 0, less a constant per row so that no temperature is too small for float32."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]


def _truncate(scaled: Tensor, rows: SamplingRows, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate to among the `width` most likely tokens: ids [r, K], logits [r, K], exact [r].

    exact: whether the answer is the same as among the whole vocabulary.
    """
    values, candidates = scaled.topk(width, dim=-1)
    is_whole = width == scaled.shape[-1]
    bounded = (rows.top_k > 0) | is_whole  # nothing outside the candidates can be kept
    log_total = scaled.log_softmax(dim=-1).gather(1, candidates[:, :1])
    log_probs = log_total - (values[:, :1] - values)  # of the whole distribution
    in_top_k = torch.where((rows.top_k > 0)[:, None], log_probs.log_softmax(dim=-1), log_probs)

    log_probs, is_typical_exact = _typical(in_top_k, rows.typical_p, bounded, scaled)
    probs = log_probs.exp()
    before = probs.cumsum(dim=-1) - probs
    uses_top_p = rows.top_p < 1
    kept = (before < rows.top_p[:, None]) | ~uses_top_p[:, None]
    bounded = bounded | (uses_top_p & (before[:, -1] >= rows.top_p))

    # relative to the most likely of those still kept; renormalizing does not change the comparison
    threshold = rows.min_p * probs.amax(dim=-1)
    kept &= probs >= threshold[:, None]
    bounded = bounded | (probs[:, -1] < threshold)

    exact = torch.where(rows.typical_p < 1, is_typical_exact, bounded)
    return candidates, values.masked_fill(~kept | log_probs.isneginf(), -torch.inf), exact


def _typical(log_probs: Tensor, typical_p: Tensor, bounded: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Locally typical sampling (Meister et al. 2022): keep the smallest set of mass `typical_p` whose surprisals
    are nearest to the entropy.

    log_probs: [r, K] of the candidates, most likely first; scaled: [r, V], for the entropy where the candidates
    are not everything (`bounded` [r] false). Returns renormalized log-probabilities [r, K], -inf where cut off,
    and [r] whether the kept set is that of the whole vocabulary.
    """
    on = typical_p < 1
    if not on.any():
        return log_probs, bounded
    entropy = torch.where(bounded, _entropy(log_probs), _entropy(scaled.log_softmax(dim=-1)))[:, None]
    deviation = (-log_probs - entropy).abs()
    order = deviation.argsort(dim=-1, stable=True)
    sorted_probs = log_probs.exp().gather(1, order)
    kept_in_order = (sorted_probs.cumsum(-1) - sorted_probs) < typical_p[:, None]
    kept = torch.zeros_like(kept_in_order).scatter(1, order, kept_in_order)
    # Every token outside has a surprisal above the last candidate's. If all that is kept deviates by less than
    # that one would, and the mass was reached before the candidates ran out, nothing outside belongs to the set.
    reach = deviation.masked_fill(~kept, 0.0).amax(-1)
    is_enough = ~kept_in_order[:, -1] & (reach <= -log_probs[:, -1] - entropy[:, 0])
    renormalized = log_probs.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)
    return torch.where(on[:, None], renormalized, log_probs), bounded | is_enough


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.where(log_probs.isneginf(), 0.0, -log_probs * log_probs.exp()).sum(dim=-1)


def _draw(values: Tensor, candidates: Tensor, rows: SamplingRows) -> Tensor:
    words = random_words(rows.seed[:, None], rows.branch[:, None], rows.position[:, None], candidates)
    best = (values + gumbel(words)).argmax(dim=-1, keepdim=True)
    return candidates.gather(1, best)[:, 0]


def _draw_from_all(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """scaled [r, V], 0 for each row's most likely token. Noise lies between -2.82 and 22.88: a token that is more
    than 25.8 behind can never be drawn. Under a constraint that is nearly all of them."""
    can_win = scaled >= -_WIDEST_NOISE
    is_few = can_win.sum(dim=-1) <= scaled.shape[-1] // _FEW
    tokens = torch.empty(len(scaled), dtype=torch.int64, device=scaled.device)
    for chosen, draw in ((is_few, _draw_from_few), (~is_few, _draw_from_every)):
        if chosen.all():
            return draw(scaled, can_win, rows)
        if chosen.any():
            at = chosen.nonzero().flatten()
            tokens[at] = draw(scaled[at], can_win[at], rows.select(at))
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
    return _draw(values, candidates, rows)
