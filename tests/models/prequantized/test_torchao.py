"""torchao checkpoints, written by hand as the library (0.18) writes them: it would slow every start if it were here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.models import ModelError

Stored = dict[str, Tensor]
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}},
}


def _int8(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    data = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    parts = {"qdata": data, "scale": scale, "zero_point": torch.zeros(len(data), 1, dtype=torch.int8)}
    return {
        f"{layer}_weight_{name}": tensor for name, tensor in parts.items()
    }, data.double() * scale.double()


def _int4_groups(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    groups = weight.view(len(weight), -1, 32)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero_point = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
    data = (groups / scale.float()[..., None] + zero_point[..., None]).round().clamp(-8, 7).to(torch.int8)
    truth = (data.double() - zero_point[..., None]) * scale.double()[..., None]
    parts = {"qdata": data.view(weight.shape), "scale": scale, "zero_point": zero_point}
    return {f"{layer}_weight_{name}": tensor for name, tensor in parts.items()}, truth.view(weight.shape)


def _float8(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    data = (weight / scale).to(torch.float8_e4m3fn)
    parts = {"qdata": data, "scale": scale}
    return {
        f"{layer}_weight_{name}": tensor for name, tensor in parts.items()
    }, data.double() * scale.double()


@pytest.mark.parametrize("encode", [_int8, _int4_groups, _float8])
def test_layouts(maker: Any, encode: Any) -> None:
    expected = maker.write(encode, TORCHAO)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_groups_of_four_bits_are_kept(maker: Any) -> None:
    expected = maker.write(_int4_groups, TORCHAO)
    assert float((maker.logits("int4") - expected).norm() / expected.norm()) < 0.03


def test_packed_data_is_refused(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _int8(layer, weight)
        return stored | {f"{layer}_weight_qdata": stored[f"{layer}_weight_qdata"].view(torch.int32)}, truth

    maker.write(encode, TORCHAO)
    with pytest.raises(ModelError, match=r"_weight_qdata is torch\.int32 \[\d+, \d+\], packed in a way"):
        maker.load()


def test_a_part_that_nobody_knows_is_refused(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _int8(layer, weight)
        return stored | {f"{layer}_weight_act_pre_scale": torch.ones(1)}, truth

    maker.write(encode, TORCHAO)
    with pytest.raises(ModelError, match="_weight_act_pre_scale is not understood"):
        maker.load()
