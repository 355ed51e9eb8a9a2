"""What the compiled norms need of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.rms_norm import add_rms_norm, rms_norm


@pytest.mark.parametrize("width", [4096, 576, 8192, 16384, 20480])
def test_a_layers_norm_and_residual(triton_compiler, width, tmp_path):
    """Llama 3's three sizes, SmolLM2's, and one that is longer than registers."""
    x, residual = (triton_compiler.empty(64, width, dtype=torch.bfloat16) for _ in range(2))
    weight = triton_compiler.empty(width, dtype=torch.bfloat16)
    triton_compiler.check_needs(
        "rms_norm",
        f"add_rms_norm {width}",
        lambda: add_rms_norm(x, residual, weight, 1e-6, rounds_first=True),
        tmp_path,
    )


def test_in_float32(triton_compiler, tmp_path):
    x = triton_compiler.empty(64, 4096, dtype=torch.float32)
    weight = triton_compiler.empty(4096, dtype=torch.float32)
    triton_compiler.check_needs(
        "rms_norm",
        "rms_norm 4096, float32",
        lambda: rms_norm(x, weight, 1e-6, rounds_first=True),
        tmp_path,
    )


def test_of_heads_in_a_merged_product(triton_compiler, tmp_path):
    x = triton_compiler.empty(64, 48, 128, dtype=torch.bfloat16)[None, :, :32]
    weight = triton_compiler.empty(128, dtype=torch.bfloat16)
    triton_compiler.check_needs(
        "rms_norm",
        "rms_norm, heads of 128",
        lambda: rms_norm(x, weight, 1e-6, offset=1.0, rounds_first=False),
        tmp_path,
    )
