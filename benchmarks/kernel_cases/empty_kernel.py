"""A kernel that does nothing, to measure what a launch takes. Imports Triton."""

import triton


def launch() -> None:
    _empty_kernel[(1,)](num_warps=4)


@triton.jit  # type: ignore[untyped-decorator]
def _empty_kernel():  # type: ignore[no-untyped-def]
    pass
