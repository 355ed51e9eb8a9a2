"""Truncations that take tokens in the order of their probabilities: top-k, typical-p, top-p, min-p.

Equally likely tokens stay or go together, except in typical-p, which counts them one by one: so what is kept does not
depend on how a sort orders them. With s the scaled logits and mass the sum of exp(s), Z that of the top-k set,

    top-k, top-p and min-p keep {i: #{j: s_j > s_i} < top_k, mass{j: s_j > s_i} < top_p Z, s_i >= max s + ln(min_p)}

which is what `fused_sampling` draws from. The vocabulary is not sorted where its most likely tokens prove to be
enough: each result says whether they were. A row's result does not depend on the rows beside it. Knows numbers only;
which width to try is `sampling`'s.
"""

import torch
from torch import Tensor

from cadenza.kernels.thresholds import entropy


def most_likely(
    scaled: Tensor, width: int, *, top_k: Tensor, typical_p: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate rows [r, V] to among the `width` most likely tokens: ids [r, K], logits [r, K], exact [r].

    All parameters [r]; 0 turns off top-k and min-p, 1 the others. exact: whether the
    answer is the same as among the whole vocabulary.
    """
    values, candidates = scaled.topk(width, dim=-1)
    is_whole = width == scaled.shape[-1]
    log_total = scaled.log_softmax(dim=-1).gather(1, candidates[:, :1])
    log_probs = log_total - (values[:, :1] - values)  # of the whole distribution
    in_top_k, is_split = _top_k(values, log_probs, top_k)
    bounded = (top_k > 0) | is_whole  # nothing outside the candidates can be kept

    log_probs, is_typical_exact = _typical(in_top_k, typical_p, bounded, scaled)
    probs = log_probs.exp()
    above = _sums_above(values, probs)
    uses_top_p = top_p < 1
    kept = (above < top_p[:, None]) | ~uses_top_p[:, None]
    bounded = bounded | (uses_top_p & (above[:, -1] >= top_p))

    # relative to the most likely of those still kept; renormalizing does not change the comparison
    threshold = min_p * probs.amax(dim=-1)
    kept &= probs >= threshold[:, None]
    bounded = bounded | (probs[:, -1] < threshold)

    exact = torch.where(typical_p < 1, is_typical_exact, bounded) & (~is_split | is_whole)
    return candidates, values.masked_fill(~kept | log_probs.isneginf(), -torch.inf), exact


def _top_k(values: Tensor, log_probs: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Renormalized log-probabilities [r, K] of the top_k and of all that equal the last of them, -inf for others; and
    [r] whether more that equal it may lie outside the candidates.

    values: [r, K], largest first.
    """
    on = top_k > 0
    last = values.gather(1, (top_k - 1).clamp(0, values.shape[-1] - 1)[:, None])
    renormalized = log_probs.masked_fill(values < last, -torch.inf).log_softmax(dim=-1)
    is_split = on & (values[:, -1] == last[:, 0]) & (last[:, 0] > -torch.inf)
    return torch.where(on[:, None], renormalized, log_probs), is_split


def _sums_above(values: Tensor, probs: Tensor) -> Tensor:
    """[r, K]: of probs, over what has a larger value: equal ones have the same. values: [r, K], largest first."""
    before = torch.nn.functional.pad(probs.cumsum(dim=-1), (1, -1))
    is_first = torch.ones_like(values, dtype=torch.bool)
    is_first[:, 1:] = values[:, 1:] < values[:, :-1]
    places = torch.arange(values.shape[-1], device=values.device).expand_as(values)
    return before.gather(1, torch.where(is_first, places, 0).cummax(dim=-1).values)


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
    expected = torch.where(bounded, entropy(log_probs), entropy(scaled.log_softmax(dim=-1)))[:, None]
    deviation = (-log_probs - expected).abs()
    order = deviation.argsort(dim=-1, stable=True)
    sorted_probs = log_probs.exp().gather(1, order)
    kept_in_order = (sorted_probs.cumsum(-1) - sorted_probs) < typical_p[:, None]
    kept = torch.zeros_like(kept_in_order).scatter(1, order, kept_in_order)
    # Every token outside has a surprisal above the last candidate's. If all that is kept deviates by less than
    # that one would, and the mass was reached before the candidates ran out, nothing outside belongs to the set.
    reach = deviation.masked_fill(~kept, 0.0).amax(-1)
    is_enough = ~kept_in_order[:, -1] & (reach <= -log_probs[:, -1] - expected[:, 0])
    renormalized = log_probs.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)
    return torch.where(on[:, None], renormalized, log_probs), bounded | is_enough
