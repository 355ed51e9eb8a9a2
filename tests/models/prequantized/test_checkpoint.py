"""Quantized checkpoints as a whole: names, ties, offload, what is said and what is refused."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from cadenza.models import LoadConfig, ModelError, load_model
from cadenza.models.prequantized.base import Format
from cadenza.models.prequantized.checkpoint import announce

Stored = dict[str, Tensor]
FP8 = {"quant_method": "fp8", "weight_block_size": None}


def _fp8(layer: str, weight: Tensor) -> tuple[Stored, Tensor]:
    scale = weight.abs().amax() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {layer + "weight": stored, layer + "weight_scale_inv": scale}, stored.double() * scale.double()


@pytest.mark.parametrize("described", [{"quant_method": "hqq"}, {"quant_method": "brand-new"}, {"bits": 4}])
def test_an_unknown_method_is_refused_by_name(maker: Any, described: dict[str, Any]) -> None:
    maker.write(_fp8, described)
    with pytest.raises(ModelError, match=f"quantized by '{described.get('quant_method')}'"):
        maker.load()


def test_a_configuration_that_no_weight_obeys_is_refused(maker: Any) -> None:
    maker.write_tensors(dict(maker.model.state_dict()), {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match="says GPTQ 4-bit, but no weight is stored so"):
        maker.load()


def test_a_weight_of_another_shape_is_refused(maker: Any) -> None:
    maker.write(
        lambda layer, weight: (_fp8(layer, weight[:32] if "k_proj" in layer else weight)[0], weight), FP8
    )
    with pytest.raises(
        ModelError, match=r"k_proj\.weight is \[32, 128\] in the checkpoint, \[64, 128\] in the model"
    ):
        maker.load()


def test_a_missing_weight_is_refused(maker: Any) -> None:
    maker.write(lambda layer, weight: ({}, weight) if "1.mlp.up_proj" in layer else _fp8(layer, weight), FP8)
    with pytest.raises(
        ModelError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.up_proj"
    ):
        maker.load()


def test_a_tied_head_is_the_embedding(maker: Any) -> None:
    maker.config.tie_word_embeddings = True
    maker.model.lm_head.weight = maker.model.model.embed_tokens.weight
    expected = maker.write(_fp8, FP8)
    file = maker.folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    module = maker.load()
    assert torch.allclose(module(torch.tensor([[3, 1, 4, 1, 5, 92, 65, 35]])).logits, expected, atol=1e-4)
    assert module.lm_head.weight is module.model.embed_tokens.weight or torch.equal(
        module.lm_head.weight, module.model.embed_tokens.weight
    )


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_mixture_whose_experts_transformers_fuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, maker: Any
) -> None:
    """Checkpoints have a weight for each expert, the module one for all: written out as floats in between."""
    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "floats")
    tensors, truth = {}, load_file(tmp_path / "floats" / "model.safetensors")
    assert any(".experts.3." in name for name in truth)
    for name, tensor in truth.items():
        if ".experts." in name or "_proj" in name:
            parts, weight = _fp8(name.removesuffix("weight"), tensor)
            tensors |= parts
            truth[name] = weight.float()
        else:
            tensors[name] = tensor
    save_file(truth, tmp_path / "floats" / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        expected = MixtralForCausalLM.from_pretrained(tmp_path / "floats")(torch.tensor([[3, 1, 4]])).logits
    maker.config, maker.model_class = config, MixtralForCausalLM
    maker.write_tensors(tensors, FP8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))  # it is often in memory
    with torch.inference_mode():
        actual = maker.load(quantization)(torch.tensor([[3, 1, 4]])).logits
    if quantization == "none":
        assert torch.allclose(actual, expected, atol=1e-4)
    else:
        assert float((actual - expected).norm() / expected.norm()) < 0.03
    assert not list(tmp_path.glob("cache/**/cadenza-*/"))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_mxfp4_is_left_to_transformers(quantization: Any, maker: Any) -> None:
    """Experts as gpt-oss has them: pairs of 4-bit floats in bytes, the first in the low half, a power of 2 for 32."""
    torch.manual_seed(2)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config).eval()
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat((numbers, -numbers))
    tensors, truth = {}, dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, blocks.shape[:3], dtype=torch.uint8)
        values = numbers[torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()]
        weight = values * (2.0 ** (scales.float() - 127))[..., None]
        truth[name] = weight.flatten(2).transpose(1, 2)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model.load_state_dict(truth)
    maker.config, maker.model_class = config, GptOssForCausalLM
    maker.write_tensors(
        tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "self_attn"]}
    )
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        expected, actual = model(ids).logits, maker.load(quantization)(ids).logits
    limit = 1e-5 if quantization == "none" else 0.03
    assert float((actual - expected).norm() / expected.norm()) < limit


def test_layers_that_wait_on_disk(maker: Any, tiny_folder: Path) -> None:
    """Dequantized whenever they come."""
    tensors = load_file(tiny_folder / "model.safetensors")
    stored: Stored = {}
    for name, tensor in tensors.items():
        stored |= _fp8(name.removesuffix("weight"), tensor)[0] if "_proj" in name else {name: tensor}
    save_file(stored, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    configuration = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(configuration | {"quantization_config": FP8}))
    whole = load_model(str(tiny_folder), LoadConfig(device="cpu", dtype="float32"))
    away = load_model(str(tiny_folder), LoadConfig(device="cpu", dtype="float32", max_memory="100MB"))
    ids = torch.tensor([[5, 90, 17, 200]])
    assert away.placement is not None
    with torch.inference_mode():
        assert torch.allclose(away.module(ids).logits, whole.module(ids).logits, atol=1e-5)


GPTQ = Format("GPTQ 4-bit", 4, lambda stored: {}, (), 128)


@pytest.mark.parametrize(
    ("stored_format", "quantization", "level", "line"),
    [
        (GPTQ, "none", "INFO", "are dequantized to float32; --quantization int4 keeps them in 4 bits"),
        (GPTQ, "int4", "INFO", "are kept in 4 bits"),
        (GPTQ, "int8", "WARNING", "are quantized again, as int8: what is lost adds up"),
        (Format("GPTQ 4-bit", 4, GPTQ.weights, (), 16), "int4", "WARNING", "are quantized again, as int4"),
        (
            Format("GPTQ 4-bit", 4, GPTQ.weights, (), 128, True),
            "int4",
            "WARNING",
            "are quantized again, as int4",
        ),
    ],
)
def test_what_becomes_of_the_weights_is_said(
    caplog: pytest.LogCaptureFixture, stored_format: Format, quantization: str, level: str, line: str
) -> None:
    with caplog.at_level("INFO"):
        announce("tiny", stored_format, quantization, 32, torch.float32)
    (record,) = caplog.records
    assert record.levelname == level
    assert f"tiny: GPTQ 4-bit weights {line}" in record.getMessage()


def test_what_is_dequantized_as_it_is_read_needs_no_cache(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "file" / "cache"))
    expected = maker.write(_fp8, FP8)
    assert torch.allclose(maker.logits(), expected, atol=1e-4)
