"""Rejection sampling of drafts that are themselves drawn: Leviathan et al. 2023; Chen et al. 2023.

    draft x ~ q stays with probability min(1, p(x) / q(x))
    otherwise a token is drawn from max(0, p - q), normalized

What comes is distributed as p, whatever q is: min(p, q) of the mass stays, and max(0, p - q) is the rest of p. What is
drawn in place of x is never x, for p(x) < q(x) there. So a result equals its draft exactly where the draft stayed, and
`kernels.verification.verify` of the results needs to know nothing of all this.

    coin  = (philox(seed, (0, position, branch, 2))[0] + 1/2) / 2^32        stays: log coin < log p(x) - log q(x)
    noise = gumbel(philox(seed, (token, position, branch, 3))[0])           else: argmax log max(0, p - q) + noise

The counter's fourth word keeps both apart from all other noise of a seed (`kernels.noise`), so from what drew x. Unlike
`verify` alone this gives another text than without drafts would come, of the same distribution. A row without a draft
(-1) has a q of 0 everywhere. Where float32 finds p above q nowhere, the draft stays.

One program reads a row, twice where its draft falls: near the floor for as many rows as a GPU has processors; fewer
take as long as a processor reads a row, tens of microseconds. Knows nothing of temperatures or truncation: p and q are
the softmax of what is given, with -inf where a token cannot come. Imports Triton, which only Linux has: import it where
there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.noise import gumbel, philox

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU. The block decides the order of
# summation, so the last bits of p and q.
BLOCK = 4096
OPTIONS = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": True}


def rejection(p: Tensor, q: Tensor, drafts: Tensor, seed: Tensor, branch: Tensor, position: Tensor) -> Tensor:
    """[R] int32: each row's token; -1 where p, or q of a draft, is no distribution (NaN, +inf, or all of it -inf).

    p, q: [R, V] logits, float32, bfloat16 or float16, rows at any distance. drafts (below V), branch, position: [R]
    int32; seed: [R] int64, read as 64 unsigned bits. q is not read where there is no draft.
    """
    num_rows, num_columns = p.shape
    assert q.shape == p.shape
    assert p.stride(1) == q.stride(1) == 1
    assert seed.dtype == torch.int64
    for numbers in (drafts, branch, position):
        assert numbers.dtype == torch.int32
    for numbers in (drafts, seed, branch, position):
        assert numbers.shape == (num_rows,)
        assert numbers.is_contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int32, device=p.device)
    if num_rows:
        rows = (p, p.stride(0), q, q.stride(0), drafts, seed, branch, position)
        _rejection_kernel[(num_rows,)](*rows, tokens, num_columns, BLOCK, **OPTIONS)
    return tokens


def rejection_reference(
    p: Tensor, q: Tensor, drafts: Tensor, seed: Tensor, branch: Tensor, position: Tensor
) -> Tensor:
    """`rejection` in plain torch, in float64."""
    has_draft = drafts >= 0
    log_p = p.double().log_softmax(dim=-1)
    log_q = q.double().log_softmax(dim=-1).masked_fill(~has_draft[:, None], -torch.inf)
    at = drafts.long().clamp_min(0)[:, None]
    zero = torch.zeros_like(at)
    counters = position.long()[:, None], branch.long()[:, None]
    coin = (philox(seed[:, None], (zero, *counters, zero + 2))[0].double() + 0.5) * 2.0**-32
    stays = (coin.log() < log_p.gather(1, at) - log_q.gather(1, at))[:, 0] & has_draft
    token = torch.arange(p.shape[1], device=p.device)[None, :]
    noise = gumbel(philox(seed[:, None], (token, *counters, zero + 3))[0])
    best, drawn = ((log_p.exp() - log_q.exp()).clamp_min(0).log() + noise).max(dim=-1)
    tokens = torch.where(stays | best.isneginf(), drafts, drawn.int())
    is_wrong = log_p.isnan().any(dim=-1) | log_q.isnan().any(dim=-1)
    return torch.where(is_wrong, -1, tokens)


def rejection_bytes(num_rows: int, num_columns: int, num_fallen: int, dtype: torch.dtype) -> int:
    """What memory must move: p and q once; again for the `num_fallen` drafts that fall, which all of it decides."""
    return (num_rows + num_fallen) * 2 * num_columns * dtype.itemsize + num_rows * 24


@triton.jit  # type: ignore[untyped-decorator]
def _rejection_kernel(  # type: ignore[no-untyped-def]
    p, p_stride, q, q_stride, drafts, seeds, branches, positions, tokens, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row). p, q: [R, V]."""
    row = tl.program_id(0).to(tl.int64)
    p += row * p_stride
    q += row * q_stride
    draft = tl.load(drafts + row)
    seed = tl.load(seeds + row)
    position = tl.load(positions + row).to(tl.uint32)
    branch = tl.load(branches + row).to(tl.uint32)
    p_top, p_log_total = _log_total(p, V, BLOCK)
    is_fine = tl.abs(p_top + p_log_total) < float("inf")
    q_top = 0.0
    q_log_total = 0.0
    stays = False
    if draft >= 0:
        q_top, q_log_total = _log_total(q, V, BLOCK)
        is_fine = is_fine & (tl.abs(q_top + q_log_total) < float("inf"))
        zero = tl.zeros((1,), tl.uint32)
        word, _, _, _ = tl.philox(seed, zero, zero + position, zero + branch, zero + 2, 7)
        coin = (tl.max(word.to(tl.float32), 0) + 0.5) * 2.3283064365386963e-10
        log_p = tl.load(p + draft).to(tl.float32) - p_top - p_log_total
        log_q = tl.load(q + draft).to(tl.float32) - q_top - q_log_total
        stays = tl.log(coin) < log_p - log_q
    token = draft
    if is_fine & (stays == 0):
        token = _drawn(
            p, q, draft, p_top + p_log_total, q_top + q_log_total, seed, branch, position, V, BLOCK
        )
    tl.store(tokens + row, tl.where(is_fine, token, -1))


@triton.jit  # type: ignore[untyped-decorator]
def _log_total(x, V: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the largest logit, the logarithm of the sum of exponentials of logits less that); no number if one is none."""
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = tl.arange(0, BLOCK) + start
        value = tl.load(x + column, mask=column < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, value)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = new_top
    largest = tl.max(top, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.log(tl.sum(total * tl.exp(top - base), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _drawn(  # type: ignore[no-untyped-def]
    p, q, draft, p_lse, q_lse, seed, branch, position, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of the largest noisy log max(0, p - q), of equal ones the first; `draft` where p is above q nowhere."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        column = tl.arange(0, BLOCK) + start
        share = tl.exp(tl.load(p + column, mask=column < V, other=float("-inf")).to(tl.float32) - p_lse)
        if draft >= 0:
            share -= tl.exp(tl.load(q + column, mask=column < V, other=float("-inf")).to(tl.float32) - q_lse)
        group = column.to(tl.uint32)
        zero = group * 0
        word, _, _, _ = tl.philox(seed, group, zero + position, zero + branch, zero + 3, 7)
        u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # as in noise.gumbel
        late = -tl.log(tl.maximum(1.0 - u, 5.9604644775390625e-08))
        noise = -tl.log(tl.where(u < 2.44140625e-04, u * (1.0 + 0.5 * u), late))
        score = tl.where(share > 0.0, tl.log(share) + noise, float("-inf"))
        token = tl.where(score > best, column, token)
        best = tl.maximum(best, score)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, token, V), 0)
    return tl.where(largest > float("-inf"), first, draft)
