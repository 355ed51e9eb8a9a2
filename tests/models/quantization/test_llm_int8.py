"""LLM.int8 against bitsandbytes' own layer, one row at a time, and against float64."""

import pytest
import torch

from cadenza.models.quantization.llm_int8 import THRESHOLD, LLMInt8, LLMInt8Linear


def _layer(out_features: int, in_features: int, bias: torch.Tensor | None = None) -> LLMInt8Linear:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) * 0.05
    layer = LLMInt8().layer(in_features, out_features, has_bias=bias is not None, dtype=torch.float32)
    for name, tensor in LLMInt8().quantize(weight).items():
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert isinstance(layer, LLMInt8Linear)
    return layer


def _rows(count: int, width: int) -> torch.Tensor:
    """Two of three rows have outliers, some of them very large."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    x[::3, 5] = 40.0
    x[::3, 17] = -7.5
    x[1::3, 60] = 900.0
    x[2::3] = x[2::3].clamp(-5, 5)
    return x


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_equals_the_papers_formula() -> None:
    layer = _layer(96, 128)
    weight, x = layer.dequantized().double(), _rows(9, 128)
    outliers = torch.where(x.abs() >= THRESHOLD, x, 0.0).double()
    rest = x.double() - outliers
    step = rest.abs().amax(1, keepdim=True) / 127
    expected = (rest / step).round() * step @ weight.T + outliers @ weight.T
    layer.prepare()
    assert _difference(layer(x), expected) < 2e-5


def test_equals_bitsandbytes_one_row_at_a_time() -> None:
    """Its mixed product; its layer, on a CPU, leaves activations as they are."""
    library = pytest.importorskip("bitsandbytes.functional")
    layer = _layer(96, 128)
    integers, largest, x = layer.qweight.clone(), layer.scale * 127, _rows(6, 128).half()
    layer.prepare()
    in_8_bits = layer._multiply(x.float())
    for number, row in enumerate(x):
        quantized, step, columns = library.int8_vectorwise_quant(row[None].clone(), threshold=THRESHOLD)
        truth, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            row[None], quantized, integers, step, largest, columns
        )
        assert _difference(layer(x.float())[number], truth[0]) < 1e-3  # it computes in float16
        assert number % 3 == 2 or _difference(in_8_bits[number], truth[0]) > 1e-2


def test_outliers_keep_their_precision() -> None:
    bias = torch.linspace(-1, 1, 64)
    layer = _layer(64, 192, bias)
    x = _rows(9, 192)
    weight = layer.dequantized().double()
    is_outlier = x.abs() >= THRESHOLD
    only = torch.where(is_outlier, x, 0.0)
    layer.prepare()
    outliers_alone = layer(only)[:2] - bias
    assert _difference(outliers_alone, only[:2].double() @ weight.T) < 2e-5
    expected = x.double() @ weight.T + bias
    small = torch.where(is_outlier, 0.0, x).double()
    largest_error = small.abs().amax(1, keepdim=True) / 254 * weight.abs().sum(1)
    assert bool(((layer(x) - expected).abs() <= largest_error + 1e-3 * expected.abs() + 1e-4).all())


def test_rows_do_not_depend_on_each_other() -> None:
    layer = _layer(160, 96)
    layer.prepare()
    x = _rows(130, 96)
    whole = layer(x)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(2))
    assert torch.equal(layer(x[order]), whole[order])
    for count in (1, 2, 3, 5, 16, 17, 64, 129):
        assert torch.equal(layer(x[-count:]), whole[-count:]), count


def test_the_integers_are_those_of_bitsandbytes() -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    integers, largest, _ = library.int8_vectorwise_quant(weight.clone())
    tensors = LLMInt8().quantize(weight)
    assert torch.equal(tensors["qweight"], integers)
    assert torch.equal(tensors["scale"], largest / 127)


def test_concatenated_layers_give_outputs_side_by_side() -> None:
    layers = [_layer(32, 64), _layer(48, 64, torch.ones(48))]
    whole = LLMInt8Linear.concatenate(layers)
    x = _rows(4, 64)
    for layer in (*layers, whole):
        layer.prepare()
    assert torch.equal(whole(x), torch.cat([layer(x) for layer in layers], dim=-1))
