"""nf4 against bitsandbytes' own layer and functions, and against float64 with dequantized weights."""

import copy
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes")

import bitsandbytes.functional as reference

from cadenza.models import ModelError
from cadenza.models.quantization import nf4
from cadenza.models.quantization.methods import method_named
from cadenza.models.quantization.nf4 import NF4, NF4Linear, interleaved


def _weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) * 0.05


def _layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NF4Linear:
    layer = NF4().layer(weight.shape[1], weight.shape[0], has_bias=bias is not None, dtype=torch.float32)
    for name, tensor in NF4().quantize(weight).items():
        empty = getattr(layer, name)
        assert (empty.shape, empty.dtype) == (tensor.shape, tensor.dtype)
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert isinstance(layer, NF4Linear)
    return layer


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_AT_ONCE", 64 * 256)  # several pieces
    weight = _weight(200, 256).to(dtype)
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    tensors = NF4().quantize(weight)
    assert torch.equal(tensors["qweight"].flatten(), packed.flatten())
    assert torch.equal(tensors["absmax"].flatten(), state.absmax)
    expected = reference.dequantize_4bit(packed, state).float()
    actual = _layer(weight.float()).dequantized()
    assert _difference(actual, expected) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(_layer(weight.float()).dequantized(64, 128), actual[64:128])


def test_layout_is_that_of_bitsandbytes() -> None:
    packed, state = reference.quantize_4bit(_weight(96, 128), blocksize=64, quant_type="nf4")
    expected, _ = reference._convert_weight_packed_for_cpu(packed, copy.deepcopy(state))
    assert torch.equal(interleaved(packed.view(96, 64)), expected)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (576, 192), (100, 64)])
def test_product(shape: tuple[int, int], is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_fused and not reference.has_avx512bf16():
        pytest.skip("this CPU lacks bfloat16 instructions")
    monkeypatch.setattr(nf4, "_has_fused_product", lambda: is_fused)
    monkeypatch.setattr(nf4, "_AT_ONCE", 64 * 192)
    bias = torch.linspace(-1, 1, shape[0])
    layer = _layer(_weight(*shape), bias)
    x = torch.randn(37, shape[1], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ layer.dequantized().double().T + bias
    assert _difference(layer(x), expected) < 1e-6
    layer.prepare()
    assert layer._is_fused == (is_fused and shape[0] % 32 == 0)
    assert _difference(layer(x[None])[0], expected) < (5e-3 if layer._is_fused else 1e-6)


@pytest.mark.parametrize("is_fused", [True, False])
def test_rows_do_not_depend_on_each_other(is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_fused and not reference.has_avx512bf16():
        pytest.skip("this CPU lacks bfloat16 instructions")
    monkeypatch.setattr(nf4, "_has_fused_product", lambda: is_fused)
    layer = _layer(_weight(192, 320))
    layer.prepare()
    x = torch.randn(300, 320, generator=torch.Generator().manual_seed(2))
    whole = layer(x)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer(x[order]), whole[order])
    for count in (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 65, 129, 256, 299):
        assert torch.equal(layer(x[-count:]), whole[-count:]), count


def test_product_equals_that_of_the_library_one_row_at_a_time() -> None:
    from bitsandbytes.nn import Linear4bit

    weight = _weight(128, 192)
    theirs = Linear4bit(
        192, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False
    )
    theirs.weight = type(theirs.weight)(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    theirs = theirs.to("cpu")
    layer = _layer(weight)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        unprepared = layer(x)
        layer.prepare()
        for row, ours in enumerate(unprepared):
            expected = theirs(x[row : row + 1])[0]
            assert _difference(ours, expected) < 5e-3
            assert _difference(layer(x)[row], expected) < 5e-3


def test_concatenated_layers_give_outputs_side_by_side() -> None:
    layers = [_layer(_weight(64, 128, seed=1)), _layer(_weight(32, 128, seed=2), torch.ones(32))]
    whole = NF4Linear.concatenate(layers)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    assert torch.equal(whole.dequantized(), torch.cat([layer.dequantized() for layer in layers]))
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert torch.allclose(whole(x), expected, rtol=1e-5, atol=1e-6)


def test_a_width_that_blocks_do_not_divide_is_left_alone() -> None:
    assert not NF4().can_quantize(64, 96)
    assert NF4().can_quantize(65, 128)


def test_without_the_library_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    nf4.bitsandbytes.cache_clear()
    with pytest.raises(
        ModelError, match=r"nf4 needs the bitsandbytes library: pip install 'cadenza\[quantizers\]'"
    ):
        method_named("nf4", 32, torch.device("cpu"))
    nf4.bitsandbytes.cache_clear()
