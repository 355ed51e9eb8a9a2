"""What the compiled kernels need of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.logit_edits import Edits, edited_rows


@pytest.mark.parametrize(
    ("num_columns", "stride", "dtype"),
    [
        (128256, 128256, torch.bfloat16),
        (128256, 128256, torch.float32),
        (50257, 50272, torch.bfloat16),
    ],
)
def test_edited_rows(triton_compiler, num_columns, stride, dtype, tmp_path):
    """Of Llama 3's vocabulary, and of GPT-2's, which no power of two divides, in padded rows."""
    empty = triton_compiler.empty
    logits = empty(8, stride, dtype=dtype)[:, :num_columns]
    indices, values = empty(100, dtype=torch.int32), empty(100, dtype=torch.float32)
    triton_compiler.check_needs(
        "logit_edits",
        f"{num_columns} {dtype}",
        lambda: edited_rows(logits, empty(4, dtype=torch.int32), Edits(indices, indices, values, values)),
        tmp_path,
    )
