"""Speculative verification: how many drafted tokens stand, from what the sampler chose behind each of them.

A branch with k drafts has k + 1 consecutive rows: row 0 chooses the next token, row i the token behind i drafts. Row
i's choice counts if everything that it was computed behind is what would have been there anyway:

    is_reached(i) = tokens(j) = drafts(j) for all j < i of the branch
    num_accepted  = the number of leading rows whose choice equals their draft

Row num_accepted is the last that is reached, and its choice is the token after the accepted ones. Sampling's noise is
a function of (seed, branch, position) alone (`kernels.noise`), so row i's choice is, given that text, the very token
that would have been drawn there without drafts: the answer is the same token by token, greedy or sampled, given the
same logits, whatever was drafted. A draft x that does not depend on this noise, such as an n-gram's, is accepted with
probability p(x): for a draft without a distribution (q(x) = 1) that is min(1, p(x) / q(x)), the rate of speculative
sampling (Leviathan et al. 2023; Chen et al. 2023), of which no scheme can have a higher one. A draft model that draws
with this very noise (Gumbel coupling) draws what the model will draw, as far as the two agree.

Knows nothing of logits, of who drafts, of stopping, or of what is done with the KV of drafts that fall. Imports Triton,
which only Linux has: import it where there is a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen by arithmetic; not measured on a GPU. A branch with more rows goes through them by so many at a time.
BLOCK = 128
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Verified:
    num_accepted: Tensor
    """[B] int32."""
    is_reached: Tensor
    """[R] int32: 1 where the row's choice counts, else 0."""


def verify(tokens: Tensor, drafts: Tensor, starts: Tensor) -> Verified:
    """All int32 and contiguous. tokens [R]: what was chosen, any negative where nothing could be; drafts [R]: what the
    choice is compared with, -1 for a branch's last row, which equals nothing; starts [B + 1], ascending: branch b has
    the rows from starts[b] to starts[b + 1]. starts[0] = 0 and starts[B] = R: what is_reached holds of rows that
    belong to no branch is undefined.
    """
    num_branches = len(starts) - 1
    assert tokens.shape == drafts.shape
    for numbers in (tokens, drafts, starts):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    num_accepted = torch.empty(num_branches, dtype=torch.int32, device=tokens.device)
    is_reached = torch.empty_like(tokens)
    if num_branches:
        _verify_kernel[(num_branches,)](tokens, drafts, starts, num_accepted, is_reached, BLOCK, **OPTIONS)
    return Verified(num_accepted, is_reached)


def verify_reference(tokens: Tensor, drafts: Tensor, starts: Tensor) -> Verified:
    """`verify` in plain torch."""
    row = torch.arange(len(tokens), device=tokens.device)
    branch = torch.searchsorted(starts[1:].contiguous(), row.int(), right=True)
    has_failed = torch.nn.functional.pad((tokens != drafts) | (drafts < 0), (1, 0)).cumsum(0)
    first = starts.long()
    is_reached = has_failed[:-1] == has_failed[first[branch]]
    reached_before = torch.nn.functional.pad(is_reached.cumsum(0), (1, 0))
    num_reached = reached_before[first[1:]] - reached_before[first[:-1]]
    num_failed = has_failed[first[1:]] - has_failed[first[:-1]]
    return Verified((num_reached - num_failed.clamp_max(1)).int(), is_reached.int())


def verify_bytes(num_rows: int, num_branches: int) -> int:
    """What memory must move: three numbers a row, two a branch. The launch takes longer."""
    return 4 * (3 * num_rows + 2 * num_branches + 1)


@triton.jit  # type: ignore[untyped-decorator]
def _verify_kernel(  # type: ignore[no-untyped-def]
    tokens, drafts, starts, num_accepted, is_reached, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (branch): the first row whose choice is another than its draft, then who comes up to it."""
    branch = tl.program_id(0)
    start = tl.load(starts + branch)
    end = tl.load(starts + branch + 1)
    failed = end
    for first in range(start, end, BLOCK):
        row = tl.arange(0, BLOCK) + first
        token = tl.load(tokens + row, mask=row < end, other=0)
        draft = tl.load(drafts + row, mask=row < end, other=0)
        is_other = (token != draft) | (draft < 0)
        failed = tl.minimum(failed, tl.min(tl.where(is_other, row, end), 0))
    tl.store(num_accepted + branch, failed - start)
    for first in range(start, end, BLOCK):
        row = tl.arange(0, BLOCK) + first
        tl.store(is_reached + row, (row <= failed).to(tl.int32), mask=row < end)
