"""What the compiled kernel needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.prefill_attention import prefill_attention
from cadenza.kernels.prefill_work import PrefillWork

BF16, FLOAT = torch.bfloat16, torch.float32
CASES = {
    "Llama 3 8B, bfloat16": (32, 8, 128, BF16, False),
    "Llama 3 8B, bfloat16, window, cap and sinks": (32, 8, 128, BF16, True),
    "Llama 3 8B, float32": (32, 8, 128, FLOAT, False),
    "SmolLM2, bfloat16": (9, 3, 64, BF16, False),
    "SmolLM2, float32": (9, 3, 64, FLOAT, False),
}


@pytest.mark.parametrize("name", CASES)
def test_prefill_attention(triton_compiler, name, tmp_path):
    """Queries are what a projection gave: [T, H, D]."""
    num_heads, num_kv_heads, dim, dtype, has_all = CASES[name]
    q = triton_compiler.empty(300, num_heads, dim, dtype=dtype)
    keys, values = (triton_compiler.empty(64, 16, num_kv_heads, dim, dtype=dtype) for _ in range(2))
    shapes = ((3, 40), (3,), (3,), (3,), (7, 2))
    work = PrefillWork(*(triton_compiler.empty(*shape, dtype=torch.int32) for shape in shapes))
    options = {}
    if has_all:
        options = {
            "window": 1000,
            "softcap": 50.0,
            "sinks": triton_compiler.empty(num_heads, dtype=dtype),
        }
    triton_compiler.check_needs(
        "prefill_attention",
        name,
        lambda: prefill_attention(q, keys, values, work, scale=0.1, **options),
        tmp_path,
    )
