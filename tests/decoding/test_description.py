"""What an engine says of itself, against a recount of its layers and its cache."""

import copy
import dataclasses
import logging
from typing import Any

import pytest
import torch

from cadenza.decoding import Engine, EngineConfig
from cadenza.models import LoadedModel
from cadenza.models.packing import can_pack
from cadenza.models.quantization.int8 import Int8, Int8Linear
from cadenza.models.sizing import kept_bytes, sized_module
from cadenza.server.commands.quantities import count, gib
from cadenza.server.commands.report import report_lines

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128)


def an_engine(model: LoadedModel, config: EngineConfig = CONFIG, **changes: Any) -> Engine:
    return Engine(dataclasses.replace(model, module=copy.deepcopy(model.module), **changes), config)


def test_a_description_is_what_is_there(
    fresh_tiny_model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cadenza.decoding.engine"), an_engine(fresh_tiny_model) as engine:
        found = engine.description
        cache = engine._core._runner._cache
        assert sum(part.nbytes for part in [*cache.keys, *cache.values]) == found.memory.num_bytes
    assert (found.device, found.dtype, found.quantization, found.offload) == ("cpu", "float32", "none", None)
    assert found.weight_bytes == fresh_tiny_model.weight_bytes
    assert found.linear == {
        "oneDNN float32, packed": 2 * 4 + 1
    }  # query, key and value are one; gate and up, too
    assert torch.backends.cpu.get_cpu_capability() in found.hardware
    assert f", {torch.get_num_threads()} thread" in found.hardware
    assert found.cache_config["num_gpu_blocks"] == str(found.memory.num_blocks)
    assert int(found.cache_config["block_size"]) * found.memory.num_blocks == engine.num_kv_tokens
    (line,) = [record.getMessage() for record in caplog.records if "engine ready" in record.getMessage()]
    assert f"weights {found.weight_bytes} bytes" in line
    assert f"KV cache {engine.num_kv_tokens} tokens" in line
    assert "\n" not in line


def test_other_precisions_use_other_operators(fresh_tiny_model: LoadedModel) -> None:
    module = copy.deepcopy(fresh_tiny_model.module).to(torch.bfloat16)
    with an_engine(dataclasses.replace(fresh_tiny_model, module=module, dtype=torch.bfloat16)) as engine:
        is_packed = can_pack(torch.device("cpu"), torch.bfloat16)  # on CPUs that have the instructions
        expected = {"oneDNN bfloat16, packed": 2 * 4 + 1} if is_packed else {"torch bfloat16": 2 * 7 + 1}
        assert engine.description.linear == expected


def test_plain_attention_is_told(fresh_tiny_model: LoadedModel) -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=fresh_tiny_model.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(1)
    module = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    with an_engine(dataclasses.replace(fresh_tiny_model, module=module, config=config)) as engine:
        assert engine.description.attention == "paged, plain matrix products"


def test_a_quantized_layer_names_its_operator() -> None:
    from cadenza.decoding.description import linear_operators

    layer = Int8().layer(64, 32, has_bias=False, dtype=torch.float32)
    assert isinstance(layer, Int8Linear)
    assert linear_operators(layer) == {}
    for name, tensor in Int8().quantize(torch.randn(32, 64)).items():
        layer._buffers[name] = tensor
    layer.prepare()
    (operator,) = linear_operators(layer)
    assert operator.endswith("8-bit activations")


def lines_of(engine: Engine, **changes: Any) -> dict[str, str]:
    found = dataclasses.replace(engine.description, **changes)
    lines = report_lines(found, {"weights": 1.5, "engine": 0.25}, 2.0, "http://localhost:1")
    assert all(line[9] == " " for line in lines)
    return {line[:9].strip(): line[10:] for line in lines}


def test_the_report_has_a_line_for_each_fact(fresh_tiny_model: LoadedModel) -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, kv_cache_memory_gb=0.0001)
    with an_engine(fresh_tiny_model, config) as engine:
        lines = lines_of(engine)
        quantized = {
            "quantization": "int8",
            "full_precision_bytes": kept_bytes(
                sized_module(
                    type(fresh_tiny_model.module),
                    copy.deepcopy(fresh_tiny_model.config),
                    torch.float32,
                    Int8(),
                )
            ),
            "offload": "on disk",
            "offloaded_bytes": 3 * 1024**2,
            "drafts": "ngram",
        }
        others = lines_of(engine, **quantized)
    tokens = int(0.0001 * 1024**3) // (2 * 32 * 4 * 16) * 16  # 2 layers of 16 keys and 16 values
    assert lines["model"] == f"{fresh_tiny_model.name}: float32 on cpu"
    assert lines["context"] == f"256 tokens; KV cache for {tokens} tokens"
    assert lines["memory"].endswith("for the KV cache: --kv-cache-memory-gb")
    assert (
        lines["at once"] == f"{tokens // 256} of 256 tokens, or 4 (max_num_seqs) of {tokens // 16 // 4 * 16}"
    )
    assert lines["loaded"] == "in 2.00 s (weights 1.50, engine 0.25)"
    assert lines["ready"] == "http://localhost:1/v1"
    assert " on disk" not in lines["weights"]
    assert " on cpu, 3.00 MiB on disk: " in others["weights"]
    assert others["drafts"] == "ngram"
    assert "parameters in int8; in float32: " in others["weights"]
    assert "norms and biases" in others["weights"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (2048, "2.00 KiB"),
        (88 * 1024**2, "88.00 MiB"),
        (512 * 1024**2, "0.50 GiB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert gib(size) == text


def test_counts_are_readable() -> None:
    assert [count(number) for number in (7, 64_200, 134_515_008, 70_553_706_496)] == [
        "7",
        "64.2 K",
        "134.5 M",
        "70.55 B",
    ]
