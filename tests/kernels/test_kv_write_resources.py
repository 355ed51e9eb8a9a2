"""What the compiled kernel needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels import kv_write


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [(8, 128, torch.bfloat16), (8, 128, torch.float32), (3, 64, torch.bfloat16), (32, 80, torch.bfloat16)],
)
def test_write_kv(triton_compiler, heads, dim, dtype, tmp_path):
    """Keys and values are what a projection gave: [T, Hkv, D]."""
    keys, values = (triton_compiler.empty(64, 16, heads, dim, dtype=dtype) for _ in range(2))
    key, value = (triton_compiler.empty(256, heads, dim, dtype=dtype) for _ in range(2))
    slots = triton_compiler.empty(256, dtype=torch.int64)
    triton_compiler.check_needs(
        "kv_write",
        f"write_kv {heads} x {dim} {dtype}",
        lambda: kv_write.write_kv(keys, values, slots, key, value),
        tmp_path,
    )
