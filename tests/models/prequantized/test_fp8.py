"""fp8 checkpoints in DeepSeek's blocks and in rows, made here by definition, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.models import ModelError

Stored = dict[str, Tensor]
BLOCK = 128


def _blocks(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    """Some layers have 192 outputs or inputs: their last block is shorter."""
    truth = torch.empty_like(weight, dtype=torch.float64)
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    out_features, in_features = weight.shape
    scales = torch.empty(-(-out_features // BLOCK), -(-in_features // BLOCK))
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            part = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scales[row, column] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            truth[part] = stored[part].double() * scales[row, column].double()
    return {layer + "weight": stored, layer + "weight_scale_inv": scales}, truth


def _rows(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {layer + "weight": stored, layer + "weight_scale": scale}, stored.double() * scale.double()


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def test_blocks(maker: Any) -> None:
    expected = maker.write(_blocks, FP8)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_rows(maker: Any) -> None:
    expected = maker.write(_rows, {"quant_method": "fbgemm_fp8"})
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_scales_of_activations_are_left_unread(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _rows(layer, weight)
        return stored | {layer + "input_scale": torch.tensor(2.0)}, truth

    expected = maker.write(encode, {"quant_method": "fp8", "weight_block_size": None})
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_a_weight_without_a_scale_is_refused(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _blocks(layer, weight)
        if layer.endswith("1.mlp.up_proj."):
            del stored[layer + "weight_scale_inv"]
        return stored, truth

    maker.write(encode, FP8)
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj\.weight is torch\.float8_e4m3fn and has 0 scales"):
        maker.load()
