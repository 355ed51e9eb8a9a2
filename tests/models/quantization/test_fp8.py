"""fp8: what is stored, against float64 arithmetic on the format's definition; what is computed, against float64."""

import pytest
import torch
from torch import Tensor

from cadenza.kernels.fp8_linear import FP8, fp8_linear, fp8_values
from cadenza.models.quantization.fp8 import Fp8, Fp8Linear
from cadenza.models.quantization.methods import method_named

SHAPES = [(64, 64), (192, 576), (1, 32), (65, 100), (130, 20), (576, 1536), (7, 3), (100, 16384)]
ROW_COUNTS = (1, 2, 3, 4, 5, 8, 16, 17, 48, 70)


def weights(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(out_features, 1, generator=generator) + 0.1
    return torch.randn(out_features, in_features, generator=generator) * spread + 0.02


def filled(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Fp8Linear:
    layer = Fp8().layer(weight.shape[1], weight.shape[0], has_bias=bias is not None, dtype=dtype)
    assert isinstance(layer, Fp8Linear)
    tensors = Fp8().quantize(weight)
    assert {name: (t.shape, t.dtype) for name, t in layer.named_buffers()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def value(code: int) -> float:
    """A sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_number_of_the_format_is_read_as_defined() -> None:
    codes = [code for code in range(256) if code & 127 != 127]  # those are NaN
    found = fp8_values(torch.tensor(codes, dtype=torch.uint8).view(FP8))
    assert found.dtype == torch.float32
    assert found.tolist() == [value(code) for code in codes]


def test_weights_are_rounded_to_the_nearest_number() -> None:
    weight = weights(40, 120)
    weight[0], weight[1, 1:], weight[2] = 0, 1e-6, 1e-42
    tensors = Fp8().quantize(weight)
    scale = weight.double().abs().amax(1, keepdim=True) / 448
    assert torch.allclose(tensors["scale"].double(), scale[:, 0], rtol=1e-6, atol=1e-44)
    numbers = torch.tensor([value(code) for code in range(256) if code & 127 != 127], dtype=torch.float64)
    quotients = weight.double() / scale.clamp_min(1e-45)
    nearest = (quotients[..., None] - numbers).abs().amin(-1)
    found = tensors["qweight"].double()
    assert ((found - quotients).abs() <= nearest + 1e-4 * quotients.abs())[3:].all()
    rebuilt = filled(weight).dequantized()
    assert (rebuilt[0] == 0).all()
    assert (rebuilt.double() - weight).abs().le(weight.abs() / 16 + scale * 2.0**-10 + 1e-38).all()


def test_rows_of_a_weight_are_read_apart() -> None:
    layer = filled(weights(192, 36))
    whole = layer.dequantized()
    assert torch.equal(layer.dequantized(64, 128), whole[64:128])
    assert torch.equal(layer.dequantized(128), whole[128:])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prepared_layer_is_the_product_with_the_dequantized_weight(shape: tuple[int, int]) -> None:
    out_features, in_features = shape
    bias = weights(1, out_features, seed=3)[0]
    layer = filled(weights(*shape), bias)
    x = torch.randn(2, 5, in_features, generator=torch.Generator().manual_seed(4))
    weight = layer.dequantized().double()
    expected = x.double() @ weight.T + bias.double()
    bound = 2**-20 * (x.double().abs() @ weight.abs().T + bias.double().abs())
    layer.prepare()
    found = layer(x)
    assert found.shape == (2, 5, out_features)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().le(bound).all()


@pytest.mark.parametrize("shape", [(192, 576), (65, 100), (960, 576), (200, 8192)])
def test_a_row_depends_on_no_other(shape: tuple[int, int]) -> None:
    layer = filled(weights(*shape))
    layer.prepare()
    x = torch.randn(ROW_COUNTS[-1], shape[1], generator=torch.Generator().manual_seed(5))
    whole = layer(x)
    for count in ROW_COUNTS:
        assert torch.equal(layer(x[:count]), whole[:count])
        assert torch.equal(layer(x[-count:]), whole[-count:])
    spoilt = x.clone()
    spoilt[3], spoilt[6, 0] = torch.nan, torch.inf
    others = [row for row in range(len(x)) if row not in (3, 6)]
    found = layer(spoilt)
    assert torch.equal(found[others], whole[others])
    assert found[3].isnan().all()
    assert not found[6].isfinite().any()


def test_joined_layers_give_the_parts_outputs() -> None:
    bias = weights(1, 128, seed=8)[0]
    layers = [
        filled(weights(50, 96, 1)),
        filled(weights(128, 96, 2), bias),
        filled(weights(192, 96, 3)),
    ]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(9))
    whole = Fp8Linear.concatenate(layers)
    assert torch.equal(whole.dequantized(), torch.cat([layer.dequantized() for layer in layers]))
    whole.prepare()
    for layer in layers:
        layer.prepare()
    assert torch.allclose(whole(x), torch.cat([layer(x) for layer in layers], dim=-1), rtol=1e-5, atol=1e-5)


def test_half_precision_models_keep_their_type() -> None:
    layer = filled(weights(64, 64), dtype=torch.bfloat16)
    layer.prepare()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(10)).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_rows_in_float8_multiply_as_defined() -> None:
    """The way of the GPUs, which torch's CPU operator goes, too."""
    weight = weights(64, 96)
    tensors = Fp8().quantize(weight)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(11))
    x[2], x[3] = 0, x[3] * 1000
    row_scale = x.double().abs().amax(1, keepdim=True) / 448
    rows = (x / row_scale.clamp_min(1e-30).float()).to(FP8).double() * row_scale
    expected = rows @ (tensors["qweight"].double() * tensors["scale"].double()[:, None]).T
    found = fp8_linear(x, tensors["qweight"], tensors["scale"])
    assert found.dtype == torch.bfloat16
    bound = 2**-8 * expected.abs() + 1e-3 * (rows.abs() @ weight.double().abs().T)
    assert (found.double() - expected).abs().le(bound).all()
    assert (found[2] == 0).all()


def test_it_is_found_by_its_name() -> None:
    assert isinstance(method_named("fp8", 32, torch.device("cpu")), Fp8)
