"""Rows times 4-bit weights against float64, in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import few_rows, int4_matmul, int4_words

FLOAT32_ERROR = 6e-7
"""Of a sum, relative to the sum of its terms' magnitudes, with those that 16 + q and 24 add to the weight's."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights would be cut in single steps: some of the cases below are cut, some are not."""
    monkeypatch.setattr(few_rows, "PROGRAMS", 4)


def weights(outputs: int, width: int, group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Integers [n, k] and scales and zeros [groups, n, 2], of a size that weights have."""
    generator = torch.Generator().manual_seed(outputs * 1009 + width)
    integers = torch.randint(0, 16, (outputs, width), generator=generator, dtype=torch.uint8)
    integers[0], integers[-1] = 15, 0
    pairs = torch.randn(-(-width // group_size), outputs, 2, generator=generator) * torch.tensor([0.02, 0.01])
    return integers.to(device), pairs.bfloat16().to(device)


def rows_of(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)) + 0.3
    return x.to(dtype).to(device)


def floats(integers: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """The weight by its definition, float64 on the CPU."""
    group = torch.arange(integers.shape[1]) // group_size
    scale, zero = pairs.double().cpu()[group].permute(2, 1, 0)
    return (integers.double().cpu() - 8) * scale + zero


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding the result may cost; the interpreter cuts off where a GPU rounds to bfloat16."""
    if dtype == torch.float32:
        return 2.0**-24
    return torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and device.type == "cpu" else 0.5)


CASES = {
    "one row": (1, 128, 256, 128, torch.bfloat16),
    "groups of 64, two heights of tiles": (17, 130, 320, 64, torch.bfloat16),
    "groups of 32, ragged ends": (3, 40, 416, 32, torch.float16),
    "many pieces, the last shorter": (2, 24, 1152, 128, torch.bfloat16),
    "float32, groups of 128": (5, 33, 384, 128, torch.float32),
    "float32, groups of 32": (18, 20, 160, 32, torch.float32),
    "a width that no group divides": (4, 10, 100, 32, torch.float32),
    "one of everything": (1, 1, 1, 32, torch.float16),
    "as many rows as are meant": (64, 64, 256, 64, torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_equals_float64(name, kernel_device):
    num_rows, outputs, width, group_size, dtype = CASES[name]
    integers, pairs = weights(outputs, width, group_size, kernel_device)
    words, weight = int4_words.pack(integers), floats(integers, pairs, group_size)
    x = rows_of(num_rows, width, dtype, kernel_device)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)).to(dtype).to(kernel_device)
    expected = x.double().cpu() @ weight.T
    scales = floats(
        torch.full_like(integers, 48), pairs.abs(), group_size
    )  # 40 times the scale: 16 + q and 24
    magnitude = x.double().cpu().abs() @ scales.T
    for given in (None, bias):
        found = int4_matmul.int4_matmul(x, words, pairs, group_size, given)
        wanted = expected if given is None else expected + given.double().cpu()
        assert found.dtype == dtype
        allowed = FLOAT32_ERROR * (magnitude + wanted.abs()) + unit(dtype, kernel_device) * wanted.abs()
        assert ((found.double().cpu() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_weight_is_rounded_once(dtype, group_size, kernel_device):
    outputs, width = 70, 256 + group_size - 20
    integers, pairs = weights(outputs, width, group_size, kernel_device)
    found = int4_matmul.dequantize(int4_words.pack(integers), pairs, group_size, width, dtype)
    expected = floats(integers, pairs, group_size)
    assert found.dtype == dtype
    assert found.shape == (outputs, width)
    # float32 rounds before 16 bits do; smallest float16 are further apart than their size says
    allowed = unit(dtype, kernel_device) * expected.abs() * 1.001 + torch.finfo(dtype).smallest_normal
    if dtype == torch.float16:
        allowed += 2.0**-25
    assert ((found.double().cpu() - expected).abs() <= allowed).all()


def test_the_references_are_the_same_functions(kernel_device):
    integers, pairs = weights(33, 200, 64, kernel_device)
    words, weight = int4_words.pack(integers), floats(integers, pairs, 64)
    found = int4_words.dequantize_reference(words, pairs, 64, 200, torch.float64)
    assert torch.equal(found.cpu(), weight)
    x = rows_of(5, 200, torch.float32, kernel_device).double()
    bias = torch.randn(33, device=kernel_device)
    for given in (None, bias):
        y = int4_matmul.int4_matmul_reference(x, words, pairs, 64, given)
        expected = x.cpu() @ weight.T + (0 if given is None else given.double().cpu())
        assert torch.allclose(y.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_words_hold_the_integers_where_they_are_said_to():
    integers = torch.randint(0, 16, (5, 300), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = int4_words.pack(integers)
    assert words.shape == (3, 5, 16)
    for output, k in ((0, 0), (1, 127), (2, 128), (3, 33), (4, 299), (0, 97), (2, 64)):
        chunk, rest = divmod(k, 128)
        j, c, half = rest // 32, rest % 32 // 2, rest % 2
        word = int(words[chunk, output, c]) % 2**32
        plain = (word >> 3 | word << 29) % 2**32
        assert plain >> (16 * half + 4 * j) & 15 == int(integers[output, k])
    assert torch.equal(int4_words.unpack(words)[:, :300], integers)
    assert not int4_words.unpack(words)[:, 300:].any()
    assert torch.equal(int4_words.unpack(words[:, 2:4]), int4_words.unpack(words)[2:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_is_the_same_bits_alone_and_in_any_company(dtype, kernel_device):
    integers, pairs = weights(40, 640, 64, kernel_device)
    words = int4_words.pack(integers)
    x = rows_of(50, 640, dtype, kernel_device)
    together = int4_matmul.int4_matmul(x, words, pairs, 64, None)
    for rows in ([0], [49], [16], list(range(16)), list(range(20, 37)), [48, 3, 17, 5]):
        assert torch.equal(int4_matmul.int4_matmul(x[rows], words, pairs, 64, None), together[rows])


def test_nothing_is_read_but_what_is_given(kernel_device, triton_interpreter, monkeypatch):
    """Views with other data around them; results and partial sums in memory full of NaN; a broken row and output."""
    num_rows, outputs, width, group_size = 19, 70, 352, 64
    integers, pairs = weights(outputs, width, group_size, kernel_device)
    words = int4_words.pack(integers)
    x = rows_of(num_rows, width, torch.bfloat16, kernel_device)
    expected = int4_matmul.int4_matmul(x, words, pairs, group_size, None)
    weight = int4_matmul.dequantize(words, pairs, group_size, width, torch.bfloat16)

    def poisoned(*shape, dtype, device):
        return triton_interpreter.poisoned(*shape, dtype=dtype, device=str(device))

    wide = poisoned(num_rows + 3, width + 21, dtype=x.dtype, device=kernel_device.type)
    wide[2:-1, 16:-5] = x
    x = wide[2:-1, 16:-5]
    more_words = poisoned(len(words), outputs + 9, 16, dtype=torch.int32, device=kernel_device.type)
    more_words[:, 4:-5] = words
    more_pairs = poisoned(len(pairs) + 2, outputs + 9, 2, dtype=torch.bfloat16, device=kernel_device.type)
    more_pairs[:-2, 4:-5] = pairs
    arguments = (more_words[:, 4:-5], more_pairs[:-2, 4:-5], group_size)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(int4_matmul.int4_matmul(x, *arguments, None), expected)
    assert torch.equal(int4_matmul.dequantize(*arguments, width, x.dtype), weight)
    wide[7] = torch.nan
    more_pairs[1, 4 + 33, 1] = torch.inf
    found = int4_matmul.int4_matmul(x, *arguments, None)
    assert found[5].isnan().all()
    assert not found[:, 33].isfinite().any()
    found[:, 33], expected[:, 33] = 0, 0
    assert torch.equal(found[6:], expected[6:])
    assert torch.equal(found[:5], expected[:5])


@pytest.mark.parametrize(("num_rows", "outputs", "width"), [(0, 5, 4), (3, 0, 4), (2, 3, 0)])
def test_empty_matrices(num_rows, outputs, width, kernel_device):
    words = int4_words.pack(torch.zeros(outputs, width, dtype=torch.uint8, device=kernel_device))
    pairs = torch.ones(-(-width // 32), outputs, 2, dtype=torch.bfloat16, device=kernel_device)
    bias = torch.ones(outputs, device=kernel_device)
    x = torch.empty(num_rows, width, device=kernel_device)
    found = int4_matmul.int4_matmul(x, words, pairs, 32, bias)
    assert found.shape == (num_rows, outputs)
    assert (found == 1).all()
    assert int4_matmul.dequantize(words, pairs, 32, width, torch.float16).shape == (outputs, width)


def test_the_bytes_that_must_move():
    assert int4_matmul.int4_matmul_bytes(3, 4096, 1024, 64, torch.bfloat16) == (
        4096 * 512 + 4096 * 16 * 4 + 3 * 1024 * 2 + 3 * 4096 * 2
    )
