"""What the compiled gated activation needs of a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels.gated_activation import gated_activation


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("silu", torch.bfloat16), ("gelu_tanh", torch.bfloat16), ("silu", torch.float32)],
)
def test_halves_of_llamas_merged_product(triton_compiler, activation, dtype, tmp_path):
    gate, up = triton_compiler.empty(64, 2 * 14336, dtype=dtype).chunk(2, dim=1)
    triton_compiler.check_needs(
        "gated_activation",
        f"{activation} {dtype}",
        lambda: gated_activation(gate, up, activation),
        tmp_path,
    )
