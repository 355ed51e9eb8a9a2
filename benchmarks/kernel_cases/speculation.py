"""Cases of speculative decoding: verification of what was sampled, and rejection sampling of drafts that were drawn."""

from collections.abc import Iterator
from functools import partial

import torch
from kernel_cases.case import Case, Sizes, Work, column, integers, pairs, randn, rows_of
from kernel_cases.sampling import random_logits
from torch import Tensor


def cases(sizes: Sizes) -> Iterator[Case]:
    count = max(sizes.batches)
    yield Case(
        "verification",
        f"{rows_of(count)} of {sizes.drafts} drafts",
        partial(_verification, sizes, count),
        is_compiled=True,
    )
    yield Case(
        "rejection",
        rows_of(count),
        partial(_rejection, sizes, count),
        is_compiled=True,
    )


def _verification(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.verification import verify, verify_bytes, verify_reference

    per_branch = sizes.drafts + 1
    shape = (count, per_branch)
    tokens = integers(*shape, seed=0, high=2, device=device, dtype=torch.int32)
    drafts = integers(*shape, seed=1, high=2, device=device, dtype=torch.int32)
    drafts[:, -1] = -1
    tokens, drafts = tokens.flatten(), drafts.flatten()
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * per_branch

    def check() -> list[tuple[Tensor, Tensor]]:
        found, true = verify(tokens, drafts, starts), verify_reference(tokens, drafts, starts)
        return [(found.num_accepted, true.num_accepted), (found.is_reached, true.is_reached)]

    return Work(
        kernel=lambda: verify(tokens, drafts, starts),
        reference=lambda: verify_reference(tokens, drafts, starts),
        check=check,
        num_bytes=verify_bytes(len(tokens), count),
    )


def _rejection(sizes: Sizes, count: int, device: torch.device) -> Work:
    """Drafts are drawn from logits that are near the model's: most stay."""
    from cadenza.kernels.rejection import rejection, rejection_bytes, rejection_reference

    p = random_logits(sizes, count, device)
    q = p + randn(*p.shape, seed=1, device=device, dtype=sizes.dtype, scale=0.5)
    probs = q.float().softmax(dim=-1)
    drawn = torch.multinomial(probs, 1, generator=torch.Generator(device).manual_seed(2))
    rows = (
        drawn[:, 0].int(),
        column(range(7, 7 + count), count, torch.int64, device),
        column(0, count, torch.int32, device),
        column(11, count, torch.int32, device),
    )
    true = rejection_reference(p, q, *rows)
    return Work(
        kernel=lambda: rejection(p, q, *rows),
        reference=lambda: rejection_reference(p, q, *rows),
        check=lambda: pairs(rejection(p, q, *rows), true),
        num_bytes=rejection_bytes(count, sizes.vocabulary, int((true != rows[0]).sum()), sizes.dtype),
        num_ties=count // 100,
    )
