"""What the compiled rotary embedding needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.rotary import rotary


@pytest.mark.parametrize(
    ("case", "heads", "kv_heads", "dim", "rot", "pairing", "dtype"),
    [
        ("Llama 3 8B", 32, 8, 128, 128, "halves", torch.bfloat16),
        ("Llama 3 8B, float32", 32, 8, 128, 128, "halves", torch.float32),
        ("SmolLM2", 9, 3, 64, 64, "halves", torch.bfloat16),
        ("a part of a head, 96 wide", 32, 32, 96, 32, "halves", torch.bfloat16),
        ("GPT-OSS", 64, 8, 64, 64, "halves_of_pairs", torch.bfloat16),
        ("neighbours", 32, 8, 128, 128, "neighbours", torch.bfloat16),
        ("GLM 4", 32, 2, 128, 64, "neighbours_by_halves", torch.bfloat16),
    ],
)
def test_rotary(triton_compiler, case, heads, kv_heads, dim, rot, pairing, dtype, tmp_path):
    """Heads side by side in one merged product."""
    q, k = (
        triton_compiler.empty(64, heads + 2 * kv_heads, dim, dtype=dtype)[None, :, first : first + count]
        for first, count in ((0, heads), (heads, kv_heads))
    )
    width = rot // 2 if pairing == "halves_of_pairs" else rot
    angles = triton_compiler.empty(1, 64, width, dtype=dtype)
    triton_compiler.check_needs(
        "rotary",
        case,
        lambda: rotary(q.transpose(1, 2), k.transpose(1, 2), angles, angles, pairing=pairing),
        tmp_path,
    )
