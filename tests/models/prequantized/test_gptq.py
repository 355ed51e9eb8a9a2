"""GPTQ and AWQ checkpoints, packed here by their definitions in AutoGPTQ and AutoAWQ, against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.models import ModelError

Stored = dict[str, Tensor]


def _round(weight: Tensor, bits: int, group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers [in, out], float16 scales [groups, out] and zeros [groups, out] from 1 on, chosen by group extremes."""
    values = weight.double().numpy().T
    num_groups = group_of.max() + 1
    top = 2**bits - 1
    low = np.stack([values[group_of == group].min(0) for group in range(num_groups)])
    high = np.stack([values[group_of == group].max(0) for group in range(num_groups)])
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 1, top).astype(np.int64)
    integers = np.clip(np.round(values / scales[group_of]) + zeros[group_of], 0, top).astype(np.int64)
    return integers, scales, zeros


def _truth(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray) -> Tensor:
    weight = (integers - zeros[group_of]).astype(np.float64) * scales.astype(np.float64)[group_of]
    return torch.from_numpy(weight.T.copy())


def _stream(integers: np.ndarray, bits: int) -> Tensor:
    """[n, columns] → [n · bits / 32, columns] int32: the lowest bits first, as one stream down each column."""
    number, columns = integers.shape
    words = np.zeros((number * bits // 32, columns), dtype=np.uint64)
    for row in range(number):
        for bit in range(bits):
            place = row * bits + bit
            words[place // 32] |= (
                (integers[row].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)
            ) << np.uint64(place % 32)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def _gptq(
    layer: str, weight: Tensor, *, bits: int, group_of: np.ndarray, stored_less: int
) -> tuple[Stored, Tensor]:
    integers, scales, zeros = _round(weight, bits, group_of)
    tensors = {
        "qweight": _stream(integers, bits),
        "qzeros": _stream((zeros - stored_less).T, bits).T,
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return {layer + name: tensor for name, tensor in tensors.items()}, _truth(
        integers, scales, zeros, group_of
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "version", "is_act_order"),
    [
        (4, 32, "gptq", False),
        (4, 64, "gptq_v2", False),
        (4, 32, "gptq", True),
        (3, 64, "gptq", False),
        (8, -1, "gptq", False),
        (2, 32, "gptq", False),
        (4, 128, "gptq", False),
    ],
)
def test_gptq(maker: Any, bits: int, group_size: int, version: str, is_act_order: bool) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        in_features = weight.shape[1]
        group_of = np.arange(in_features) // (group_size if group_size > 0 else in_features)
        if is_act_order:
            group_of = np.random.default_rng(0).permutation(group_of)
        return _gptq(layer, weight, bits=bits, group_of=group_of, stored_less=int(version == "gptq"))

    expected = maker.write(
        encode,
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "checkpoint_format": version,
            "sym": False,
        },
    )
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def test_gptq_without_group_numbers_uses_the_configured_size(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        group_of = np.arange(weight.shape[1]) // 128  # of the 192 inputs of one layer, the last group has 64
        stored, truth = _gptq(layer, weight, bits=4, group_of=group_of, stored_less=1)
        del stored[layer + "g_idx"]
        return stored, truth

    expected = maker.write(encode, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


def _awq_words(integers: np.ndarray) -> Tensor:
    """[rows, out] → [rows, out / 8]: AutoAWQ's `order_map`."""
    words = np.zeros((len(integers), integers.shape[1] // 8), dtype=np.uint32)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= integers[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32).copy())


def _awq(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    group_of = np.arange(weight.shape[1]) // 64
    integers, scales, zeros = _round(weight, 4, group_of)
    tensors = {
        "qweight": _awq_words(integers),
        "qzeros": _awq_words(zeros),
        "scales": torch.from_numpy(scales),
    }
    return {layer + name: tensor for name, tensor in tensors.items()}, _truth(
        integers, scales, zeros, group_of
    )


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def test_awq(maker: Any) -> None:
    expected = maker.write(_awq, AWQ)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_awq_is_quantized_again(maker: Any, quantization: str) -> None:
    expected = maker.write(_awq, AWQ)
    actual = maker.logits(quantization)
    assert float((actual - expected).norm() / expected.norm()) < (0.05 if quantization == "int8" else 0.03)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ checkpoints in the gemv layout"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "GPTQ checkpoints in the marlin layout",
        ),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits"),
    ],
)
def test_other_layouts_are_refused(maker: Any, described: dict[str, Any], message: str) -> None:
    maker.write(_awq, described)
    with pytest.raises(ModelError, match=message):
        maker.load()


def test_a_missing_part_is_refused(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _awq(layer, weight)
        if layer.endswith("down_proj."):
            del stored[layer + "qzeros"]
        return stored, truth

    maker.write(encode, AWQ)
    with pytest.raises(ModelError, match=r"down_proj\.qweight lacks its qzeros"):
        maker.load()


def test_a_tensor_beside_a_weight_that_nobody_knows_is_refused(maker: Any) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _awq(layer, weight)
        return stored | {layer + "smooth": torch.ones(3)}, truth

    maker.write(encode, AWQ)
    with pytest.raises(ModelError, match="smooth is not understood"):
        maker.load()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_that_the_model_lacks_must_be_zero(maker: Any, value: float) -> None:
    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        stored, truth = _awq(layer, weight)
        return stored | {layer + "bias": torch.full((len(weight),), value)}, truth

    expected = maker.write(encode, AWQ)
    if value:
        with pytest.raises(
            ModelError, match=r"\w+_proj\.bias is in the checkpoint, but the model adds nothing there"
        ):
            maker.load()
    else:
        assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)
