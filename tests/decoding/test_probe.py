"""The start-up check of models that have little to ask: what a quantized one keeps may be no parameter at all."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from cadenza.decoding import Engine, EngineConfig
from cadenza.models import LoadConfig, LoadedModel


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_every_tensor_is_quantized(
    quantization: Any,
    dtype: Any,
    smollm2: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OLMo's norms have no weights, and its linear layers no biases."""
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "olmo"
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OlmoConfig(vocab_size=smollm2.config.vocab_size, **sizes, bos_token_id=0, eos_token_id=0)
    OlmoForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smollm2.path / name).read_bytes())
    load = LoadConfig(device="cpu", dtype=dtype, quantization=quantization)
    engine_config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, kv_cache_memory_gb=0.005)
    answers = []
    for limit in (None, "40MB"):
        with Engine.load(str(folder), dataclasses.replace(load, max_memory=limit), engine_config) as engine:
            assert list(engine.model.module.parameters()) == []
            choice = engine.generate("Once", max_tokens=4, temperature=0, ignore_eos=True).choices[0]
            answers.append(choice.token_ids)
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]
