"""bitsandbytes checkpoints as the library itself writes them, against its own dequantization."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("bitsandbytes")

import bitsandbytes.functional as library

Stored = dict[str, Tensor]


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 64), ("nf4", 128)])
def test_four_bits(maker: Any, kind: str, block: int, is_nested: bool) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        packed, state = library.quantize_4bit(
            weight, blocksize=block, quant_type=kind, compress_statistics=is_nested
        )
        parts = {f"{layer}weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        truth = library.dequantize_4bit(packed, state).double()
        if weight.shape[1] % block:  # there the library's CPU kernel (0.50.2) takes the wrong scales
            halves = packed.flatten()
            values = state.code.double()[torch.stack((halves >> 4, halves % 16), 1).flatten().int()]
            scales = state.absmax
            if is_nested:
                scales = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
            truth = (values.view(-1, block) * scales.double()[:, None]).view(weight.shape)
        return parts | {layer + "weight": packed}, truth

    described = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": is_nested,
    }
    expected = maker.write(encode, described)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def _rows(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    integers, largest, _ = library.int8_vectorwise_quant(weight.clone())
    parts = {"weight": integers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    truth = integers.double() * largest.double()[:, None] / 127
    return {layer + name: tensor for name, tensor in parts.items()}, truth


INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_eight_bits(maker: Any) -> None:
    expected = maker.write(_rows, INT8)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_eight_bits_stay_the_same_integers(maker: Any) -> None:
    maker.write(_rows, INT8)
    module = maker.load("llm-int8")
    integers, largest, _ = library.int8_vectorwise_quant(
        maker.model.model.layers[1].mlp.up_proj.weight.detach().clone()
    )
    layer = module.model.layers[1].mlp.up_proj
    assert torch.equal(layer.qweight, integers)
    assert torch.equal(layer.scale, largest / 127)


def test_nf4_stays_the_same_numbers(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        packed, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        parts = {f"{layer}weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return parts | {layer + "weight": packed}, library.dequantize_4bit(packed, state).double()

    maker.write(encode, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    module = maker.load("nf4")
    packed, state = library.quantize_4bit(
        maker.model.model.layers[0].self_attn.q_proj.weight.detach(), blocksize=64, quant_type="nf4"
    )
    layer = module.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.qweight.flatten(), packed.flatten())
    assert torch.equal(layer.absmax.flatten(), state.absmax)
