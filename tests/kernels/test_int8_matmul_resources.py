"""What the compiled kernels need of a GPU. Shapes are Llama 3 8B's."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels import int8_matmul

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
CASES = {
    "o, 16 rows": (16, 4096, 4096, BFLOAT16),
    "gate and up, 64 rows": (64, 28672, 4096, BFLOAT16),
    "float32, 64 rows": (64, 28672, 4096, FLOAT32),
}


@pytest.mark.parametrize("case", CASES)
def test_int8_matmul(triton_compiler, case, tmp_path):
    """Weights of other shapes, but for whether they are cut in pieces, are other numbers for the same code."""
    num_rows, outputs, width, dtype = CASES[case]
    x = triton_compiler.empty(num_rows, width, dtype=dtype)
    weight = triton_compiler.empty(outputs, width, dtype=torch.int8)
    scale = triton_compiler.empty(outputs, dtype=torch.float32)

    def call() -> None:
        int8_matmul.int8_matmul(x, weight, scale, None)

    triton_compiler.check_needs("int8_matmul", case, call, tmp_path)


def test_all_heights_use_the_same_instruction_in_the_same_order(triton_compiler, tmp_path, monkeypatch):
    """Bits must not depend on the number of rows. wgmma, which 64 rows in one program would get, sums otherwise."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weight = triton_compiler.empty(4096, 4096, dtype=torch.int8)
    scale = triton_compiler.empty(4096, dtype=torch.float32)
    per_program = {}
    for num_rows in (16, 17):
        x = triton_compiler.empty(num_rows, 4096, dtype=BFLOAT16)
        with triton_compiler.recording() as launches:
            int8_matmul.int8_matmul(x, weight, scale, None)
        arguments = launches[0].arguments
        assert (arguments["STEP"], arguments["OUTPUTS"], arguments["per_split"]) == (128, 128, 4)
        code = triton_compiler.compiled(launches[0], 90).asm["ptx"]
        assert "wgmma" not in code
        per_program[num_rows] = code.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
        assert per_program[num_rows] == code.count("mma.sync")
    assert per_program == {16: 32, 17: 64}
