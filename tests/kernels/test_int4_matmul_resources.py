"""What the compiled kernels need of a GPU. Shapes are Llama 3 8B's."""

import re

import pytest
import torch

pytest.importorskip("triton")

from cadenza.kernels import int4_matmul

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
CASES = {
    "o, 16 rows, groups of 128": (16, 4096, 4096, 128, BFLOAT16),
    "o, 64 rows, groups of 128": (64, 4096, 4096, 128, BFLOAT16),
    "gate and up, 64 rows, groups of 64": (64, 28672, 4096, 64, BFLOAT16),
    "gate and up, groups of 32": (64, 28672, 4096, 32, BFLOAT16),
    "float32, groups of 64": (64, 28672, 4096, 64, FLOAT32),
}


@pytest.mark.parametrize("case", CASES)
def test_int4_matmul(triton_compiler, case, tmp_path):
    """Weights of other shapes, but for whether they are cut in pieces, are other numbers for the same code."""
    num_rows, outputs, width, group_size, dtype = CASES[case]
    x = triton_compiler.empty(num_rows, width, dtype=dtype)
    words, pairs = weights(triton_compiler, outputs, width, group_size)

    def call() -> None:
        int4_matmul.int4_matmul(x, words, pairs, group_size, None)

    triton_compiler.check_needs("int4_matmul", case, call, tmp_path)


def test_dequantize(triton_compiler, tmp_path):
    words, pairs = weights(triton_compiler, 28672, 4096, 64)

    def call() -> None:
        int4_matmul.dequantize(words, pairs, 64, 4096, BFLOAT16)

    triton_compiler.check_needs("int4_matmul", "dequantize, groups of 64", call, tmp_path)


def weights(triton_compiler, outputs, width, group_size):
    return (
        triton_compiler.empty(width // 128, outputs, 16, dtype=torch.int32),
        triton_compiler.empty(width // group_size, outputs, 2, dtype=BFLOAT16),
    )


def test_all_heights_use_the_same_instructions_in_the_same_order(triton_compiler, tmp_path, monkeypatch):
    """Bits must not depend on the number of rows: nor of products (wgmma, which 64 rows in one program would get, sums
    otherwise) nor of the rows' own sums, whose order is that of the threads along the inputs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words, pairs = weights(triton_compiler, 4096, 4096, 128)
    found = {}
    for num_rows in (16, 64):
        x = triton_compiler.empty(num_rows, 4096, dtype=BFLOAT16)
        with triton_compiler.recording() as launches:
            int4_matmul.int4_matmul(x, words, pairs, 128, None)
        arguments = launches[0].arguments
        assert (arguments["PART"], arguments["OUTPUTS"], arguments["per_split"]) == (128, 128, 4)
        code = triton_compiler.compiled(launches[0], 90).asm
        assert "wgmma" not in code["ptx"]
        loop = code["ttgir"][code["ttgir"].index("scf.for") :]
        loop = loop[: loop.index("scf.yield")]
        assert "async_copy_global_to_local" in loop
        assert "tt.load" not in loop  # all that is read is fetched ahead,
        assert "convert_layout" not in loop  # and no number changes threads
        products = code["ptx"].count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
        assert products == code["ptx"].count("mma.sync")
        found[arguments["ROWS"]] = products // arguments["ROWS"], layouts_of_sums(code["ttgir"])
    assert found[16] == found[32]
    assert found[16][0] == 2


def layouts_of_sums(code: str) -> list[str]:
    """How the rows lie in threads where they are summed."""
    names = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<\d+x128xf32, (#\w+)>\)', code, re.DOTALL)
    layouts = [line for name in names for line in re.findall(rf"^{name} = (.*)$", code, re.MULTILINE)]
    assert layouts
    return layouts
