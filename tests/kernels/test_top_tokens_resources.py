"""What the compiled kernels need of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels import top_tokens as module
from cadenza.kernels.top_tokens import TopRows, top_tokens


def check(
    triton_compiler, num_columns: int, dtype: torch.dtype, width: int, is_masked: bool, tmp_path
) -> None:
    empty = triton_compiler.empty
    logits = empty(8, -(-num_columns // 16) * 16, dtype=dtype)[:, :num_columns]
    bitmask = empty(8, -(-num_columns // 32), dtype=torch.int32) if is_masked else None
    rows = TopRows(*(empty(8, dtype=torch.int32) for _ in range(5)))
    case = f"{width} of {num_columns} {dtype}{', masked' if is_masked else ''}"
    triton_compiler.check_needs(
        "top_tokens", case, lambda: top_tokens(logits, bitmask, rows, width), tmp_path
    )


@pytest.mark.parametrize(
    ("dtype", "width", "is_masked"),
    [(torch.bfloat16, 8, True), (torch.float32, 64, False)],
)
def test_top_tokens(triton_compiler, dtype, width, is_masked, tmp_path):
    """Of Llama 3's vocabulary, the fewest and the most that are picked: what lies between takes less than the most."""
    check(triton_compiler, 128256, dtype, width, is_masked, tmp_path)


def test_a_ragged_vocabulary_is_read_in_wide_loads_too(triton_compiler, tmp_path, monkeypatch):
    """GPT-2's, which no power of two divides, in padded rows. The second kernel reads few of them."""
    monkeypatch.setattr(module, "_pick", lambda *arguments: None)
    check(triton_compiler, 50257, torch.bfloat16, 8, False, tmp_path)
