"""What the compiled kernel needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.rejection import rejection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rejection(triton_compiler, dtype, tmp_path):
    """Of Llama 3's vocabulary."""
    empty = triton_compiler.empty
    p, q = empty(2, 160, 128256, dtype=dtype).unbind()
    number = empty(160, dtype=torch.int32)
    rows = (p, q, number, empty(160, dtype=torch.int64), number, number)
    triton_compiler.check_needs("rejection", f"{dtype}", lambda: rejection(*rows), tmp_path)
