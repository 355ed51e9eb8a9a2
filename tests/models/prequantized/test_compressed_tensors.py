"""compressed-tensors checkpoints as the library itself compresses them, against its own decompression."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.models import ModelError

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

Stored = dict[str, Tensor]


def _extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, as scales are shaped."""
    out_features, in_features = weight.shape
    if args.strategy == "group":
        blocks = weight.view(out_features, -1, args.group_size)
        return blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -in_features % columns, 0, -out_features % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return weight.amin().reshape(1), weight.amax().reshape(1)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 128]},
        ),
    ],
)
def test_layouts(maker: Any, layout: str, options: dict[str, Any]) -> None:
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def encode(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
        scale, zero_point = calculate_qparams(*_extremes(weight, args), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        stored = compressor.compress(state, scheme)
        truth = compressor.decompress(dict(stored), scheme)["weight"]
        return {layer + name: tensor for name, tensor in stored.items()}, truth.double()

    described = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
        "ignore": ["lm_head"],
    }
    expected = maker.write(encode, described)
    assert torch.allclose(maker.logits(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized layout cannot be read"),
        ({"format": "marlin-24"}, "marlin-24 layout cannot be read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"transform_config": {"config_groups": {"a": {}}}}, "with transforms"),
    ],
)
def test_other_layouts_are_refused(maker: Any, described: dict[str, Any], message: str) -> None:
    maker.write_tensors(dict(maker.model.state_dict()), {"quant_method": "compressed-tensors"} | described)
    with pytest.raises(ModelError, match=message):
        maker.load()
