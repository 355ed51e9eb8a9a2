"""Cases of speculative decoding: verification of what was sampled."""

from collections.abc import Iterator
from functools import partial

import torch
from kernel_cases.case import Case, Sizes, Work, integers, rows_of
from torch import Tensor


def cases(sizes: Sizes) -> Iterator[Case]:
    count = max(sizes.batches)
    yield Case(
        "verification",
        f"{rows_of(count)} of {sizes.drafts} drafts",
        partial(_verification, sizes, count),
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
