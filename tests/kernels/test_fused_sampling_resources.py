"""What the compiled kernels need of a GPU."""

from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.fused_sampling import FusedRows, fused_sampling

KINDS = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32, "seed": torch.int64}


@pytest.mark.parametrize(
    ("dtype", "wants_logprobs"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_a_vocabulary_of_128256(triton_compiler, dtype, wants_logprobs, tmp_path):
    """Whether rows have masks, edited logits or filters is in their parameters: it compiles nothing else."""
    empty = triton_compiler.empty
    rows = FusedRows(
        **{item.name: empty(256, dtype=KINDS.get(item.name, torch.int32)) for item in fields(FusedRows)}
    )
    logits, edited = empty(256, 128256, dtype=dtype), empty(8, 128256, dtype=torch.float32)
    bitmask = empty(8, 4008, dtype=torch.int32)
    triton_compiler.check_needs(
        "fused_sampling",
        f"{dtype}{', logprobs' if wants_logprobs else ''}",
        lambda: fused_sampling(logits, edited, bitmask, rows, wants_logprobs=wants_logprobs),
        tmp_path,
    )
