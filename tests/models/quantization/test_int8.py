"""int8 layers: the formula in float64, every product that a machine may have, and rows that know of no other rows."""

from collections.abc import Callable, Iterator

import pytest
import torch
from scipy.linalg import hadamard as scipys_hadamard
from torch import Tensor, nn

from cadenza.kernels import int8_linear as kernel
from cadenza.kernels.int8_linear import CHUNKED, INT_MM, ONEDNN, Product, quantize_rows
from cadenza.models.quantization import int8, rotation
from cadenza.models.quantization.embedding import QuantizedEmbedding
from cadenza.models.quantization.int8 import Int8, Int8Linear, product_for, quantize_channels

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 5), (48, 33), (100, 333), (576, 192), (1536, 40), (2049, 9)]
PRODUCTS = {"onednn": ONEDNN, "int_mm": INT_MM, "chunked": CHUNKED}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Product:
    found = PRODUCTS[request.param]
    if not int8._is_exact(found, CPU):
        pytest.skip("this machine lacks it")
    return found


def random_layer(
    width: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Int8Linear:
    generator = torch.Generator().manual_seed(width * 10_007 + outputs)
    layer = Int8().layer(width, outputs, has_bias=bias, dtype=dtype)
    assert isinstance(layer, Int8Linear)
    weight = torch.randn(outputs, width, generator=generator) * 0.05
    for name, tensor in Int8().quantize(weight).items():
        setattr(layer, name, tensor)
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs, generator=generator).to(dtype), requires_grad=False)
    return layer


def rows_like_a_models(count: int, width: int) -> Tensor:
    """Few columns hold far larger numbers than the others."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))
    x[:, width // 2] *= 40
    return x


def truth(layer: Int8Linear, x: Tensor) -> Tensor:
    """float64, with the rotation as scipy has it. Before `prepare`."""
    size = rotation.block_size(layer.in_features)
    matrix = torch.from_numpy(scipys_hadamard(size)).double()
    rotated = (x.double().unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    return kernel.reference(rotated, layer.qweight, layer.scale, layer.bias)


@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_the_weight_is_within_half_a_step_of_the_original_once_rotated(width: int, outputs: int) -> None:
    weight = torch.randn(outputs, width, generator=torch.Generator().manual_seed(0)).double()
    size = rotation.block_size(width)
    matrix = torch.from_numpy(scipys_hadamard(size)).double()
    rotated = (weight.unflatten(-1, (-1, size)) @ matrix).flatten(-2) / size
    tensors = Int8().quantize(weight.float())
    step = rotated.abs().amax(1, keepdim=True) / 127
    error = tensors["qweight"].double() * tensors["scale"].double()[:, None] - rotated
    assert tensors["qweight"].abs().amax() == 127
    assert bool((error.abs() <= 0.5001 * step).all())
    layer = random_layer(width, outputs, bias=False)
    layer.qweight, layer.scale = tensors["qweight"], tensors["scale"]
    error = (layer.dequantized().double() - weight).norm(dim=1)
    assert bool((error <= 0.51 * step[:, 0] * size**0.5 * width**0.5).all())
    assert torch.equal(layer.dequantized(1, 4), layer.dequantized()[1:4])


def test_a_large_weight_is_quantized_in_pieces() -> None:
    weight = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0))
    whole = quantize_channels(weight)
    assert weight.numel() > int8._AT_ONCE
    for row in (0, 63, 64, 299):
        alone = quantize_channels(weight[row : row + 1])
        assert torch.equal(whole["qweight"][row], alone["qweight"][0])
        assert torch.equal(whole["scale"][row], alone["scale"][0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_before_prepare_it_multiplies_with_the_dequantized_weight(
    width: int, outputs: int, bias: bool
) -> None:
    layer = random_layer(width, outputs, bias=bias)
    x = rows_like_a_models(6, width).view(2, 3, width)
    expected = x.double() @ layer.dequantized().double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_prepared_it_is_the_formula(
    width: int, outputs: int, bias: bool, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "product_for", lambda device: product)
    layer = random_layer(width, outputs, bias=bias)
    for shape in ((width,), (1, width), (2, 9, width)):
        x = rows_like_a_models(18, width).flatten()[: torch.Size(shape).numel()].view(shape)
        fresh = random_layer(width, outputs, bias=bias)
        expected = truth(fresh, x)
        fresh.prepare()
        # sums of the rotation in float32 may fall on the other side of a half: few integers, by 1
        step = 1e-5 + float(layer.scale.max()) * x.abs().amax() * rotation.block_size(width) ** 0.5
        actual = fresh(x)
        assert actual.shape == expected.shape
        assert actual.dtype == torch.float32
        assert float((actual - expected).abs().max()) < 2 * step
        assert float((actual - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6


def test_products_agree_to_the_last_bit(product: Product) -> None:
    q = torch.randint(-127, 128, (23, 2100), generator=torch.Generator().manual_seed(1))
    weight = torch.randint(-127, 128, (37, 2100), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    q[0], weight[0] = 127, 127  # the largest sum
    factor = torch.rand(37, generator=torch.Generator().manual_seed(3))
    rows = (q + product.zero_point).to(torch.uint8 if product.zero_point else torch.int8)
    expected = (q.double() @ weight.double().T).float() * factor
    assert torch.equal(product.multiply(rows, product.lay_out(weight), factor), expected)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_row_does_not_depend_on_the_number_of_rows(
    width: int, outputs: int, num_threads: int, threads: Callable[[int], None]
) -> None:
    threads(num_threads)
    layer = random_layer(width, outputs)
    layer.prepare()
    x = rows_like_a_models(70, width)
    everything = layer(x)
    for count in range(1, 71) if num_threads == 1 else (1, 2, 3, 15, 17, 64, 69):
        assert torch.equal(layer(x[:count]), everything[:count]), count
        assert torch.equal(layer(x[-count:]), everything[-count:]), count


@pytest.mark.parametrize("width", [64, 100])
def test_a_row_without_numbers_stays_alone(width: int, product: Product) -> None:
    layer = random_layer(width, 24)
    x = rows_like_a_models(20, width)
    layer.prepare()
    layer._product, layer._laid_out = product, product.lay_out(random_layer(width, 24).qweight)
    expected = layer(x)
    broken = x.clone()
    broken[3, 2], broken[8, 1], broken[19] = torch.nan, torch.inf, -torch.inf
    actual = layer(broken)
    is_broken = torch.zeros(20, dtype=torch.bool)
    is_broken[[3, 8, 19]] = True
    assert bool(actual[is_broken].isnan().all())
    assert torch.equal(actual[~is_broken], expected[~is_broken])


def test_rows_of_zeros_and_of_tiny_and_huge_numbers() -> None:
    layer = random_layer(192, 24)
    x = rows_like_a_models(4, 192)
    x[0] = 0
    x[1] *= 1e-36
    x[2] *= 1e30
    expected = truth(layer, x)
    layer.prepare()
    assert layer.bias is not None
    assert torch.equal(layer(x)[0], layer.bias)
    torch.testing.assert_close(layer(x)[1], layer.bias, rtol=0, atol=1e-20)
    assert float((layer(x)[2] - expected[2]).norm() / expected[2].norm()) < 2e-3


def test_no_rows_and_rows_that_do_not_lie_together() -> None:
    layer = random_layer(64, 32)
    layer.prepare()
    assert layer(torch.empty(0, 64)).shape == (0, 32)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 32)
    x = torch.randn(40, 128)
    assert torch.equal(layer(x[::3, :64]), layer(x[:, :64].contiguous())[::3])
    assert torch.equal(layer(x[:, 64:].view(2, 20, 64).transpose(0, 1)[5]), layer(x[[5, 25], 64:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end_only(dtype: torch.dtype) -> None:
    layer, wide = random_layer(192, 40, dtype=dtype), random_layer(192, 40)
    assert layer.bias is not None
    wide.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    x = rows_like_a_models(33, 192).to(dtype)
    assert layer(x).dtype == dtype
    layer.prepare()
    wide.prepare()
    assert torch.equal(layer(x), wide(x.float()).to(dtype))
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), layer(x))


def test_layers_side_by_side_give_what_they_give_alone() -> None:
    layers = [random_layer(96, 24), random_layer(96, 40, bias=False), random_layer(96, 8)]
    whole = Int8Linear.concatenate(layers)
    whole.prepare()
    x = rows_like_a_models(5, 96)
    for layer in layers:
        layer.prepare()
    assert torch.equal(whole(x), torch.cat([layer(x) for layer in layers], dim=1))


def test_a_machine_whose_product_overflows_gets_another() -> None:
    saturating = Product(
        0,
        lambda weight: weight,
        lambda q, weight, factor: (q.float() @ weight.float().T).clamp(-32768, 32767) * factor,
    )
    assert not int8._is_exact(saturating, CPU)
    assert int8._is_exact(CHUNKED, CPU)
    assert product_for(CPU) in PRODUCTS.values()


def test_integers_are_rounded_to_nearest_and_reach_the_ends() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, -0.5, -2.5, 0.49, 63.51]])
    for zero_point in (0, 128):
        q, largest = quantize_rows(x, zero_point)
        assert (q.int() - zero_point).tolist() == [[127, -127, 0, 2, 0, -2, 0, 64]]
        assert largest.tolist() == [[127.0]]


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_butterflies_are_the_matrix(size: int) -> None:
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(scipys_hadamard(size)).double()
    assert torch.equal(rotation.hadamard(size).double(), matrix)
    torch.testing.assert_close(rotation.butterflies(x).double(), x.double() @ matrix, rtol=1e-5, atol=1e-5)


def test_without_a_packed_product_rows_are_alone_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_packed", lambda size, num_threads: None)
    layer = random_layer(192, 40)
    x = rows_like_a_models(33, 192)
    expected = truth(layer, x)
    layer.prepare()
    assert float((layer(x) - expected).norm() / expected.norm()) < 2e-3
    for count in (1, 2, 3, 17, 32):
        assert torch.equal(layer(x[:count]), layer(x)[:count])


def test_sums_that_32_bits_do_not_hold_are_refused() -> None:
    assert Int8().can_quantize(8, 2**16)
    assert 255 * 127 * 2**16 < 2**31
    assert not Int8().can_quantize(8, 2**16 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_is_its_dequantized_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    tensors = QuantizedEmbedding.quantize(weight)
    layer = QuantizedEmbedding(50, 24, dtype)
    layer.qweight, layer.scale = tensors["qweight"], tensors["scale"]
    dequantized = tensors["qweight"].double() * tensors["scale"].double()[:, None]
    assert bool(((dequantized - weight).abs() <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all())
    for ids in (torch.tensor([[3, 7, 49], [0, 3, 3]]), torch.tensor(5), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(layer(ids), dequantized[ids].float().to(dtype))
    plain = nn.Embedding(50, 24)
    for wrong in (50, -1):
        with pytest.raises(IndexError):
            plain(torch.tensor([wrong]))
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))
    assert quantize_channels(weight)["scale"][7] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "outputs"), [(7, 5), (48, 33), (100, 333), (576, 192)])
def test_where_triton_runs_rows_keep_their_activations(
    width: int, outputs: int, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few, by the kernel, and many, piece by piece: they equal the product with the dequantized weight."""
    monkeypatch.setattr(int8, "_FLOATS_AT_ONCE", 1)
    layer = random_layer(width, outputs, dtype=dtype).to(kernel_device)
    weight, bias = layer.dequantized().double(), layer.bias
    assert bias is not None
    layer.prepare()
    assert layer.operator == "Triton int8 up to 64 rows; torch, dequantized, above"
    x = rows_like_a_models(80, width).to(dtype).to(kernel_device)
    for rows in (x[:1], x[5], x[:64].view(2, 32, width), x[:17, None], x[:0], x):
        found = layer(rows)
        expected = rows.double() @ weight.T + bias.double()
        assert found.shape == expected.shape
        assert found.dtype == dtype
        magnitude = rows.double().abs().amax(-1, keepdim=True) * weight.abs().sum(1) + bias.double().abs()
        # rotated in float32, and rounded once more to the model's dtype, where there are many the weight, too
        bound = 2 * torch.finfo(dtype).eps * magnitude * rotation.block_size(width) ** 0.5
        assert ((found.double() - expected).abs() <= bound).all()


def test_where_triton_runs_a_row_is_the_same_bits_in_any_small_step(kernel_device: torch.device) -> None:
    layer = random_layer(192, 40, dtype=torch.bfloat16).to(kernel_device)
    layer.prepare()
    x = rows_like_a_models(64, 192).bfloat16().to(kernel_device)
    together = layer(x)
    for start, stop in ((0, 1), (63, 64), (5, 21), (20, 50)):
        assert torch.equal(layer(x[start:stop]), together[start:stop])


def test_rotated_rows_have_room_in_float16(kernel_device: torch.device) -> None:
    layer = random_layer(64, 16, bias=False, dtype=torch.float16).to(kernel_device)
    weight = layer.dequantized().double()
    layer.prepare()
    x = torch.full((2, 64), 4000.0, dtype=torch.float16, device=kernel_device)
    expected = x.double() @ weight.T
    assert float((layer(x).double() - expected).norm()) <= 2e-3 * float(expected.norm())
