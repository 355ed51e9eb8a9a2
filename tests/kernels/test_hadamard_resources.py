"""What the compiled kernel needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels import hadamard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotate_blocks(triton_compiler, dtype, tmp_path):
    """Llama 3 8B's hidden states."""
    x = triton_compiler.empty(16, 4096, dtype=dtype)

    def call() -> None:
        hadamard.rotate_blocks(x, 64, 1 / 8)

    triton_compiler.check_needs("hadamard", f"hidden states {dtype}", call, tmp_path)
