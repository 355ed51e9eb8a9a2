"""What the compiled kernel needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.verification import verify


def test_verify(triton_compiler, tmp_path):
    rows, starts = (triton_compiler.empty(size, dtype=torch.int32) for size in (160, 33))
    triton_compiler.check_needs("verification", "160 rows", lambda: verify(rows, rows, starts), tmp_path)
