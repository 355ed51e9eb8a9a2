"""Rows times 8-bit weights against float64, in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import few_rows, int8_matmul

FLOAT32_ERROR = 4e-7
"""Of a sum, relative to the sum of its terms' magnitudes."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights would be cut in single steps: half of the cases below are cut, half are not."""
    monkeypatch.setattr(few_rows, "PROGRAMS", 4)


def weights(outputs: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs * 1009 + width)
    weight = torch.randint(-128, 128, (outputs, width), generator=generator, dtype=torch.int8)
    weight[0] = -128
    scale = torch.rand(outputs, generator=generator) + 0.01
    bias = torch.randn(outputs, generator=generator) * 100
    return weight.to(device), scale.to(device), bias.to(device)


def rows_of(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype).to(device)


def truth(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(result, sum of magnitudes), float64 on the CPU, in words of the definition."""
    x, weight, scale = x.double().cpu(), weight.double().cpu(), scale.double().cpu()
    result, magnitude = x @ (weight.T * scale), x.abs() @ (weight.abs().T * scale)
    if bias is None:
        return result, magnitude
    return result + bias.double().cpu(), magnitude + bias.double().cpu().abs()


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding the result may cost; the interpreter cuts off where a GPU rounds to bfloat16."""
    if dtype == torch.float32:
        return 2.0**-24
    return torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and device.type == "cpu" else 0.5)


CASES = {
    "one row": (1, 128, 256, torch.bfloat16),
    "one of everything": (1, 1, 1, torch.float32),
    "two heights of tiles, ragged ends": (17, 130, 300, torch.bfloat16),
    "many pieces, the last shorter": (3, 40, 900, torch.float16),
    "float32": (5, 33, 200, torch.float32),
    "as many rows as are meant": (64, 96, 384, torch.float16),
    "more rows": (70, 20, 140, torch.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_equals_float64(name, kernel_device):
    num_rows, outputs, width, dtype = CASES[name]
    x = rows_of(num_rows, width, dtype, kernel_device)
    weight, scale, bias = weights(outputs, width, kernel_device)
    for given in (None, bias, bias.to(dtype)):
        y = int8_matmul.int8_matmul(x, weight, scale, given)
        expected, magnitude = truth(x, weight, scale, given)
        assert y.dtype == dtype
        allowed = FLOAT32_ERROR * magnitude + unit(dtype, kernel_device) * expected.abs()
        assert ((y.double().cpu() - expected).abs() <= allowed).all()


def test_the_reference_is_the_same_function(kernel_device):
    weight, scale, bias = weights(33, 200, kernel_device)
    x = rows_of(5, 200, torch.float32, kernel_device).double()
    for given in (None, bias):
        found = int8_matmul.int8_matmul_reference(x, weight, scale, given)
        assert torch.allclose(found.cpu(), truth(x, weight, scale, given)[0], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_is_the_same_bits_alone_and_in_any_company(dtype, kernel_device):
    weight, scale, bias = weights(40, 600, kernel_device)
    x = rows_of(50, 600, dtype, kernel_device)
    together = int8_matmul.int8_matmul(x, weight, scale, bias)
    for rows in ([0], [49], [16], list(range(16)), list(range(20, 37)), [48, 3, 17, 5]):
        assert torch.equal(int8_matmul.int8_matmul(x[rows], weight, scale, bias), together[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_read_but_what_is_given(dtype, kernel_device, triton_interpreter, monkeypatch):
    """Views with other data around them; results and partial sums in memory full of NaN; a broken row."""
    num_rows, outputs, width = 19, 70, 300
    weight, scale, bias = weights(outputs, width, kernel_device)
    x = rows_of(num_rows, width, dtype, kernel_device)
    expected = int8_matmul.int8_matmul(x, weight, scale, bias)
    wide = triton_interpreter.poisoned(num_rows + 3, width + 21, dtype=dtype, device=kernel_device.type)
    wide[2:-1, 16:-5] = x
    large = torch.full((outputs + 9, width + 20), 111, dtype=torch.int8, device=kernel_device)
    large[4:-5, 16:-4] = weight
    monkeypatch.setattr(torch, "empty", poisoned_empty(triton_interpreter))
    found = int8_matmul.int8_matmul(wide[2:-1, 16:-5], large[4:-5, 16:-4], scale, bias)
    assert torch.equal(found, expected)
    wide[7] = torch.nan
    found = int8_matmul.int8_matmul(wide[2:-1, 16:-5], large[4:-5, 16:-4], scale, bias)
    assert found[5].isnan().all()
    assert torch.equal(found[6:], expected[6:])
    assert torch.equal(found[:5], expected[:5])


def poisoned_empty(triton_interpreter):
    def empty(*shape, dtype, device):
        return triton_interpreter.poisoned(*shape, dtype=dtype, device=str(device))

    return empty


@pytest.mark.parametrize(("num_rows", "outputs", "width"), [(0, 5, 4), (3, 0, 4), (2, 3, 0)])
def test_empty_matrices(num_rows, outputs, width, kernel_device):
    weight = torch.empty(outputs, width, dtype=torch.int8, device=kernel_device)
    ones = torch.ones(outputs, device=kernel_device)
    x = torch.empty(num_rows, width, device=kernel_device)
    found = int8_matmul.int8_matmul(x, weight, ones, ones)
    assert found.shape == (num_rows, outputs)
    assert (found == 1).all()


def test_pieces_cover_the_inputs_and_depend_on_the_weight_alone(monkeypatch):
    monkeypatch.undo()
    assert few_rows.split(32, 32) == (8, 4)  # 4096 x 4096
    assert few_rows.split(48, 32) == (5, 7)  # 6144 x 4096
    assert few_rows.split(224, 32) == (1, 32)  # 28672 x 4096
    assert few_rows.split(32, 112) == (8, 14)  # 4096 x 14336
    assert few_rows.split(1002, 32) == (1, 32)  # a head of 128256
    for num_blocks in range(1, 300, 7):
        for num_chunks in range(1, 130):
            pieces, per_piece = few_rows.split(num_blocks, num_chunks)
            assert (pieces - 1) * per_piece < num_chunks <= pieces * per_piece


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_added_up_in_their_order(dtype, kernel_device, triton_interpreter):
    """2^24, 1, -2^24 and then the bias: float32 loses the 1 if it comes second."""
    big = 2.0**24
    partial = torch.zeros(3, 2, 1030, device=kernel_device)
    partial[:, 0, -1] = torch.tensor([big, 1.0, -big])
    partial[:, 1, -1] = torch.tensor([big, -big, 1.0])
    bias = torch.full((1030,), 0.5, device=kernel_device)
    out = triton_interpreter.poisoned(2, 1030, dtype=dtype, device=kernel_device.type)
    few_rows.sum_splits(partial, bias, out)
    assert out[:, -1].tolist() == [0.5, 1.5]
    assert (out[:, :-1] == 0.5).all()
    few_rows.sum_splits(partial, None, out)
    assert out[:, -1].tolist() == [0.0, 1.0]
    total = torch.zeros(2, 1030, dtype=torch.float64, device=kernel_device)
    few_rows.sum_splits_reference(partial.double(), bias.double(), total)
    assert total[:, -1].tolist() == [1.5, 1.5]


def test_the_bytes_that_must_move():
    assert int8_matmul.int8_matmul_bytes(3, 4096, 1024, torch.bfloat16) == (
        4096 * 1024 + 4096 * 4 + 3 * 1024 * 2 + 3 * 4096 * 2
    )
    assert few_rows.sum_splits_bytes(8, 3, 4096, torch.bfloat16) == 3 * 4096 * (8 * 4 + 2)
