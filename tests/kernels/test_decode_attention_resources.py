"""What the compiled kernels need of a GPU."""

import json
from pathlib import Path

import pytest
import torch

from cadenza.kernels.decode_work import plan_decode

pytest.importorskip("triton")

from cadenza.kernels import decode_attention as kernel

WORK = plan_decode([[0] * 32] * 4, [511] * 4, 16, 4).upload(torch.device("cpu"))
WORK_OF_TWO = plan_decode([[0] * 32] * 4, [511] * 4, 16, 2).upload(torch.device("cpu"))
WORK_OF_THREE = plan_decode([[0] * 32] * 4, [511] * 4, 16, 3).upload(torch.device("cpu"))
WORK_OF_EIGHT = plan_decode([[0] * 32] * 4, [511] * 4, 16, 8).upload(torch.device("cpu"))
SINKS = {"window": 128, "softcap": 50.0}

CASES = {
    "llama 8b, bfloat16": (WORK, 32, 8, 128, torch.bfloat16, {}),
    "smollm2, bfloat16": (WORK_OF_THREE, 9, 3, 64, torch.bfloat16, {}),
    "llama 8b, float32": (WORK, 32, 8, 128, torch.float32, {}),
    "everything, 64 of 8, bfloat16": (WORK_OF_EIGHT, 64, 8, 64, torch.bfloat16, SINKS),
    "heads of 8, bfloat16": (WORK_OF_TWO, 4, 2, 8, torch.bfloat16, {}),
    "heads of 256, bfloat16": (WORK, 16, 4, 256, torch.bfloat16, {"softcap": 50.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_decode_attention(triton_compiler, name, tmp_path):
    work, heads, kv_heads, dim, dtype, options = CASES[name]
    q = triton_compiler.empty(4, heads, dim, dtype=dtype)
    keys, values = (triton_compiler.empty(100, 16, kv_heads, dim, dtype=dtype) for _ in range(2))
    sinks = triton_compiler.empty(heads, dtype=dtype) if "window" in options else None

    def call() -> None:
        kernel.decode_attention(q, keys, values, work, scale=dim**-0.5, sinks=sinks, **options)

    triton_compiler.check_needs("decode_attention", name, call, tmp_path)


def test_it_fits_beside_others():
    """Of an SM's shared memory, on sm_86 and 89 too, and of its tensor cores, where they multiply such numbers."""
    table = json.loads((Path(__file__).parent / "resources" / "decode_attention.json").read_text())
    assert len(table) == len(CASES) * 2 * 2
    for row, needs in table.items():
        assert needs["shared"] <= 99 * 1024
        assert needs["wide_loads"] > 0 or "heads of 8" in row  # which are padded to 16
        assert (needs["tensor_cores"] > 0) == ("bfloat16" in row and "_split_kernel" in row)
