"""What the compiled kernels need of a GPU."""

import numpy as np
import pytest
import torch

from cadenza.kernels.lora_segments import segment

pytest.importorskip("triton")

from cadenza.kernels import lora_sgmv

SEGMENTS = segment(np.arange(40), np.arange(40) // 20, None, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shrink(triton_compiler, dtype, tmp_path):
    """Of Llama 3 8B's down projection, seven chunks."""
    x = triton_compiler.empty(40, 14336, dtype=dtype)
    a = triton_compiler.empty(2 * 14336, 16, dtype=dtype)
    triton_compiler.check_needs(
        "lora_sgmv", f"shrink {dtype}", lambda: lora_sgmv.shrink(x, a, SEGMENTS), tmp_path
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expand(triton_compiler, dtype, tmp_path):
    """Of its up projection, from two chunks."""
    y = triton_compiler.empty(2, 40, 16, dtype=torch.float32)
    out, b = (triton_compiler.empty(rows, 14336, dtype=dtype) for rows in (40, 2 * 16))
    triton_compiler.check_needs(
        "lora_sgmv", f"expand {dtype}", lambda: lora_sgmv.expand_(out, y, b, SEGMENTS), tmp_path
    )
