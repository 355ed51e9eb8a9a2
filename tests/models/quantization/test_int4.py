"""int4: what is stored, against float64; what is computed, against the product with what is stored."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.kernels.int4_linear import LAYOUTS, cpu_layout
from cadenza.models.errors import ModelError
from cadenza.models.quantization import int4
from cadenza.models.quantization.groups import quantize_groups
from cadenza.models.quantization.int4 import Int4, Int4Linear, layout_for
from cadenza.models.quantization.methods import method_named

CPU = torch.device("cpu")
LAYOUT = layout_for(CPU)
SHAPES = [(64, 64), (192, 576), (1, 32), (65, 100), (48, 1536), (130, 20), (16, 4224)]
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 70)


def weights(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(out_features, 1, generator=generator) + 0.1
    return torch.randn(out_features, in_features, generator=generator) * spread + 0.02


def filled(method: Int4, weight: Tensor, bias: Tensor | None = None) -> Int4Linear:
    tensors = method.quantize(weight)
    layer = method.layer(weight.shape[1], weight.shape[0], has_bias=bias is not None, dtype=torch.float32)
    assert isinstance(layer, Int4Linear)
    assert {name: (t.shape, t.dtype) for name, t in layer.named_buffers()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def defined(layer: Int4Linear, tensors: Mapping[str, Tensor], row: int, column: int) -> float:
    """One weight, by torch's description of its operator, byte by byte."""
    columns = tensors["qweight"].shape[1] * 2
    block = layer.layout.block
    inside, half = row % block, block // 2
    byte, is_high = (
        (inside // 2, inside % 2) if layer.layout.has_neighbours else (inside % half, inside // half)
    )
    at = (row // block * columns + column) * half + byte
    packed = int(tensors["qweight"].flatten()[at])
    scale, zero = tensors["scales_and_zeros"][column // layer.group_size, row].tolist()
    return ((packed >> 4 if is_high else packed & 15) - 8) * scale + zero


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", [(65, 100), (192, 64)])
def test_dequantized_weights_are_what_the_bytes_say(shape: tuple[int, int], layout: Any) -> None:
    method = Int4(32, layout)
    weight = weights(*shape)
    tensors, layer = method.quantize(weight), filled(method, weight)
    found = layer.dequantized()
    assert found.shape == weight.shape
    for row in range(0, shape[0], 7):
        for column in range(0, shape[1], 3):
            expected = defined(layer, tensors, row, column)
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert torch.equal(layer.dequantized(64, shape[0]), found[64:])
    assert torch.equal(layer.dequantized(0, 64), found[:64])


def test_this_cpu_s_layout_is_known() -> None:
    """Otherwise the operator is not used at all, and int4 is slow."""
    layout = cpu_layout()
    assert layout is not None
    integers = torch.randint(0, 16, (192, 96), generator=torch.Generator().manual_seed(1))
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int(), 1)
    assert torch.equal(layout.pack(integers.to(torch.uint8)), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_give_back_what_they_were_given(layout: Any) -> None:
    integers = torch.randint(0, 16, (192, 36), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    packed = layout.pack(integers)
    assert packed.shape == (192, 18)
    assert torch.equal(layout.unpack(packed), integers)
    assert torch.equal(layout.unpack(packed[64:128]), integers[64:128])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_prepared_layer_is_the_product_with_the_dequantized_weight(
    shape: tuple[int, int], group_size: int
) -> None:
    """Within what rounding the activations and the result to bfloat16 costs: 2^-8 of each."""
    out_features, in_features = shape
    bias = weights(1, out_features, seed=3)[0]
    layer = filled(Int4(group_size, LAYOUT), weights(*shape), bias)
    x = torch.randn(2, 5, in_features, generator=torch.Generator().manual_seed(4))
    weight = layer.dequantized().double()
    expected = x.double() @ weight.T + bias.double()
    bound = 2**-8 * (x.double().abs() @ weight.abs().T + expected.abs() + bias.double().abs())
    layer.prepare()
    found = layer(x)
    assert found.shape == (2, 5, out_features)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().le(bound).all()
    exact = x.bfloat16().double() @ weight.T  # and all of the error is rounding, none of it summation
    bound = 2**-8 * exact.abs() + 2**-20 * (x.double().abs() @ weight.abs().T + bias.double().abs())
    assert (found.double() - exact - bias.double()).abs().le(bound).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(192, 576), (65, 100), (960, 128), (16, 4224)])
def test_a_row_depends_on_no_other(shape: tuple[int, int], group_size: int) -> None:
    layer = filled(Int4(group_size, LAYOUT), weights(*shape))
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


def counted_errors(weight: Tensor, rebuilt: Tensor, group_size: int) -> Tensor:
    """By group: squared errors, each counted as much as its weight is large. float64."""
    groups, found = (t.double().unflatten(1, (-1, group_size)) for t in (weight, rebuilt))
    counts = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    return (counts * (found - groups).square()).sum(-1)


def extremes_only(weight: Tensor, group_size: int) -> Tensor:
    """Plain rounding between the smallest and the largest weight of a group, scale and zero in bfloat16."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().double()
    zero = ((low + high) / 2 + scale / 2).bfloat16().double()
    integers = ((groups.double() - zero) / scale + 8).round().clamp(0, 15)
    return ((integers - 8) * scale + zero).flatten(1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_search_is_never_worse_than_rounding_and_on_the_whole_better(group_size: int) -> None:
    weight = weights(96, 1152)
    weight[5, 40] = 9.0  # an outlier
    searched = filled(Int4(group_size, LAYOUT), weight).dequantized()
    plain = extremes_only(weight, group_size)
    found, reference = (counted_errors(weight, rebuilt, group_size) for rebuilt in (searched, plain))
    assert (found <= reference * (1 + 1e-3)).all()
    assert found.sum() < 0.92 * reference.sum()
    assert (searched.double() - weight).square().sum() < 0.92 * (plain - weight).square().sum()


def test_weights_on_a_lattice_are_recovered() -> None:
    """As those of a Q4_1 file are: integers from 0 to 15, times a scale, plus a minimum, both float16."""
    generator = torch.Generator().manual_seed(6)
    integers = torch.randint(0, 16, (64, 8, 32), generator=generator).float()
    integers[..., 0], integers[..., 1] = 0, 15
    scale = (torch.rand(64, 8, 1, generator=generator) * 0.02 + 0.001).half().float()
    low = (-8 * scale * (1 + 0.1 * torch.randn(64, 8, 1, generator=generator))).half().float()
    weight = (integers * scale + low).flatten(1)
    found, _, _ = quantize_groups(weight, 32)
    assert torch.equal(found.view(64, 8, 32), integers.to(torch.uint8))
    error = filled(Int4(32, LAYOUT), weight).dequantized() - weight
    assert (error.unflatten(1, (8, 32)).abs() <= 0.05 * scale).all()
    assert error.square().mean().sqrt() < 0.004 * weight.square().mean().sqrt()
    exact = ((integers - 8) * scale.bfloat16().float() + low.bfloat16().float()).flatten(1)
    assert torch.equal(filled(Int4(32, LAYOUT), exact).dequantized(), exact)


def test_constant_zero_and_tiny_groups() -> None:
    weight = weights(64, 128)
    weight[0] = 0
    weight[1] = 0.3
    weight[2, :32] = -1.75
    weight[3] *= 1e-30
    weight[4] = 1e-42
    found = filled(Int4(32, LAYOUT), weight).dequantized()
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert (found[1] - 0.3).abs().max() <= 0.3 * 2**-8
    assert (found[2, :32] == -1.75).all()
    assert (found[3] - weight[3]).abs().max() < 0.1 * weight[3].abs().max()
    assert found[4].abs().max() < 1e-38


def test_a_row_that_is_not_finite_stays_alone() -> None:
    weight = weights(64, 64)
    sound = filled(Int4(32, LAYOUT), weight).dequantized()
    weight[7, 3], weight[9, 3] = torch.nan, torch.inf
    found = filled(Int4(32, LAYOUT), weight).dequantized()
    others = [row for row in range(64) if row not in (7, 9)]
    assert torch.equal(found[others], sound[others])


@pytest.mark.parametrize("last", [192, 50])
def test_joined_layers_give_the_parts_outputs(last: int) -> None:
    method = Int4(32, LAYOUT)
    bias = weights(1, 128, seed=8)[0]
    layers = [
        filled(method, weights(64, 96, 1)),
        filled(method, weights(128, 96, 2), bias),
        filled(method, weights(last, 96, 3)),
    ]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(9))
    whole = Int4Linear.concatenate(layers)
    assert whole is not None
    assert torch.equal(whole.dequantized(), torch.cat([layer.dequantized() for layer in layers]))
    whole.prepare()
    for layer in layers:
        layer.prepare()
    assert torch.equal(whole(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert Int4Linear.concatenate([layers[2], layers[0]]) is None or last % 64 == 0


def test_half_precision_models_keep_their_type() -> None:
    layer = filled(Int4(32, LAYOUT), weights(65, 100))
    layer.prepare()
    x = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(10)).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x).float(), layer(x.float()))
    assert layer(x[:0]).shape == (0, 3, 65)


def test_other_devices_compute_with_dequantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled(Int4(32, LAYOUT), weights(65, 100))
    layer.layout = next(layout for layout in LAYOUTS if layout != cpu_layout())
    layer.qweight = layer.layout.pack(cpu_integers(layer))
    expected = layer(torch.eye(100))
    layer.prepare()
    assert torch.allclose(layer(torch.eye(100)), expected, rtol=1e-6, atol=1e-7)


def cpu_integers(layer: Int4Linear) -> Tensor:
    layout = cpu_layout()
    assert layout is not None
    return layout.unpack(layer.qweight)


def test_keys_tell_layouts_and_group_sizes_apart() -> None:
    methods = [Int4(size, layout) for size in (32, 64, 128) for layout in LAYOUTS]
    assert len({method.key for method in methods}) == len(methods)


def test_a_group_size_that_no_operator_has_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="quantization_group_size 48 is not one of 32, 64, 128"):
        method_named("int4", 48, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "group_size"), [((65, 100), 32), ((192, 576), 64), ((48, 1536), 128)])
def test_where_triton_runs_the_layer_is_the_product_with_the_dequantized_weight(
    shape: tuple[int, int],
    group_size: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few rows, by the kernel, and many, piece by piece; weights laid out piece by piece, in any CPU's layout."""
    monkeypatch.setattr(int4, "_AT_ONCE", 1)
    monkeypatch.setattr(int4, "_DEQUANTIZED_AT_ONCE", 1)
    bias = weights(1, shape[0], seed=3)[0].to(dtype)
    layer = filled(Int4(group_size, LAYOUTS[1]), weights(*shape), bias).to(kernel_device)
    assert layer.group_size == group_size
    layer.dtype = dtype
    weight = layer.dequantized().double()
    layer.prepare()
    assert layer.operator == f"Triton int4, groups of {group_size}, up to 64 rows; torch, dequantized, above"
    x = torch.randn(5, 14, shape[1], generator=torch.Generator().manual_seed(4)).to(dtype).to(kernel_device)
    for rows in (x[:1], x[:, 0], x[0, 0], x[0].T.contiguous().T, x, x[:0]):
        found = layer(rows)
        expected = rows.double() @ weight.T + bias.double().to(kernel_device)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        magnitude = rows.double().abs() @ weight.abs().T + 1
        bound = 2e-6 * magnitude
        if dtype == torch.bfloat16:
            bound += 2**-7 * expected.abs()
            if rows.numel() == x.numel():  # many rows: the weight is rounded as well
                bound += 2**-7 * magnitude
        assert ((found.double() - expected).abs() <= bound).all()


def test_where_triton_runs_a_row_is_the_same_bits_in_any_small_step(kernel_device: torch.device) -> None:
    layer = filled(Int4(64, LAYOUT), weights(65, 576)).to(kernel_device)
    layer.prepare()
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(10)).bfloat16().to(kernel_device)
    together = layer(x)
    for start, stop in ((0, 1), (63, 64), (5, 21), (20, 50)):
        assert torch.equal(layer(x[start:stop]), together[start:stop])
