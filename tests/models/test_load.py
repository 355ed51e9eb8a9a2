"""Loading a folder: the module is transformers' own, and what cannot work is refused before it is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

from cadenza.models import LoadConfig, ModelError, load_model
from cadenza.models.architecture import causal_lm_class

CPU = LoadConfig(device="cpu")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


def refused(folder: Path, config: LoadConfig = CPU) -> str:
    with pytest.raises(ModelError) as refusal:
        load_model(str(folder), config)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_the_module_is_the_checkpoint(tiny_folder: Path, tiny_model: LlamaForCausalLM) -> None:
    loaded = load_model(str(tiny_folder), CPU)
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    torch.testing.assert_close(loaded.module(ids).logits, tiny_model(ids).logits)
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert (loaded.name, loaded.source, loaded.path) == ("tiny", str(tiny_folder), tiny_folder)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert loaded.config.hidden_size == 64
    assert loaded.timings.keys() == {"resolve", "import", "tokenizer", "weights"}


def test_shards_load_like_one_file(sharded_folder: Path, tiny_model: LlamaForCausalLM) -> None:
    found = load_model(str(sharded_folder), CPU).module.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in tiny_model.state_dict().items())


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_precision_is_the_one_asked_for(tiny_folder: Path, name: Any) -> None:
    loaded = load_model(str(tiny_folder), LoadConfig(device="cpu", dtype=name))
    assert loaded.dtype is getattr(torch, name)
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {loaded.dtype}


def test_automatic_precision_on_a_cpu_is_float32(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    edit_json(tiny_folder / "config.json", dtype="bfloat16")
    assert load_model(str(tiny_folder), CPU).module.model.norm.weight.dtype is torch.float32


def test_pickles_load_only_when_allowed(tiny_folder: Path, tiny_model: LlamaForCausalLM) -> None:
    (tiny_folder / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), tiny_folder / "pytorch_model.bin")
    assert "pickle" in refused(tiny_folder)
    loaded = load_model(str(tiny_folder), LoadConfig(device="cpu", allow_pickle=True))
    assert torch.equal(loaded.module.model.norm.weight, tiny_model.model.norm.weight)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            T5Config(architectures=["T5ForConditionalGeneration"]),
            "T5ForConditionalGeneration.*encoder-decoder",
        ),
        (BertConfig(architectures=["BertModel"]), "BertModel"),
        (BertConfig(architectures=["BertLMHeadModel"]), "BertLMHeadModel.*encoder"),
        (MambaConfig(architectures=["MambaForCausalLM"]), "MambaForCausalLM.*recurrent"),
        (ViTConfig(architectures=["ViTModel"]), "ViTModel"),
        (MistralConfig(architectures=["MistralModel"]), "MistralModel has no language-model head"),
    ],
)
def test_architectures_that_cannot_work_are_named(
    tiny_folder: Path, config: PreTrainedConfig, reason: str
) -> None:
    config.save_pretrained(tiny_folder)
    with pytest.raises(ModelError, match=reason):
        load_model(str(tiny_folder), CPU)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(
            architectures=["GPTNeoXForCausalLM"]
        ),  # a decoder, although its config says is_decoder: false
        BertConfig(architectures=["BertLMHeadModel"], is_decoder=True),
    ],
)
def test_decoders_are_not_taken_for_encoders(config: PreTrainedConfig) -> None:
    assert config.architectures == [causal_lm_class(config, trust_remote_code=False).__name__]


def test_unknown_types_and_foreign_code_are_refused(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "config.json", model_type="from-the-future", architectures=["FutureForCausalLM"])
    assert "from-the-future" in refused(tiny_folder)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(tiny_folder / "config.json", auto_map=code)
    (tiny_folder / "own.py").write_text("raise SystemExit('this must never run')")
    assert "(own.OwnConfig); pass --trust-remote-code" in refused(tiny_folder)
    edit_json(tiny_folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert type(load_model(str(tiny_folder), CPU).module) is LlamaForCausalLM


def test_foreign_code_runs_when_trusted(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(tiny_folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    (tiny_folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    loaded = load_model(str(tiny_folder), LoadConfig(device="cpu", trust_remote_code=True))
    assert type(loaded.module).__name__ == "OwnForCausalLM"


def test_damaged_and_missing_files_are_one_line_each(tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "model.norm.weight" in refused(tiny_folder)
    save_file(tensors | {"model.norm.weight": norm[:-1]}, weights, metadata={"format": "pt"})
    assert "cannot be loaded" in refused(tiny_folder)
    (tiny_folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(tiny_folder)
    (tiny_folder / "tokenizer.json").unlink()
    assert "tokenizer" in refused(tiny_folder)
    (tiny_folder / "config.json").write_text("{")
    assert "configuration" in refused(tiny_folder)


def test_what_does_not_fit_is_refused_with_numbers(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 100 kB\n")
    monkeypatch.setattr("cadenza.models.memory.PROC", tmp_path)
    assert "does not fit" in refused(tiny_folder)


def test_the_context_is_bounded_by_the_model(tiny_folder: Path) -> None:
    assert load_model(str(tiny_folder), LoadConfig(device="cpu", max_model_len=64)).max_model_len == 64
    assert "129 exceeds the 128" in refused(tiny_folder, LoadConfig(device="cpu", max_model_len=129))
    assert "at least 1" in refused(tiny_folder, LoadConfig(device="cpu", max_model_len=0))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    edit_json(tiny_folder / "config.json", rope_parameters=yarn)
    assert load_model(str(tiny_folder), CPU).max_model_len == 512


def test_mistaken_settings_are_named(tiny_folder: Path) -> None:
    assert "float8" in refused(tiny_folder, LoadConfig(device="cpu", dtype="float8"))  # type: ignore[arg-type]
    assert "'tpu'" in refused(tiny_folder, LoadConfig(device="tpu"))
    assert "cuda:99" in refused(tiny_folder, LoadConfig(device="cuda:99"))
    assert "no.jinja" in refused(tiny_folder, LoadConfig(device="cpu", chat_template="no.jinja"))
    assert "no.json" in refused(tiny_folder, LoadConfig(device="cpu", generation_config="no.json"))


def test_sampling_defaults_are_the_models(tiny_folder: Path, tmp_path: Path) -> None:
    file = tiny_folder / "generation_config.json"
    author = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "min_p": None}
    edit_json(file, do_sample=True, max_new_tokens=7, **author)
    expected = {name: value for name, value in author.items() if value is not None}
    assert load_model(str(tiny_folder), CPU).sampling_defaults == expected
    none = LoadConfig(device="cpu", generation_config="none")
    assert load_model(str(tiny_folder), none).sampling_defaults == {}
    own = tmp_path / "own.json"
    own.write_text('{"temperature": 0.1}')
    assert load_model(
        str(tiny_folder), LoadConfig(device="cpu", generation_config=str(own))
    ).sampling_defaults == {"temperature": 0.1}
    edit_json(file, do_sample=False)
    assert load_model(str(tiny_folder), CPU).sampling_defaults == {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
    }
    edit_json(file, do_sample=True, temperature="hot")
    assert "temperature" in refused(tiny_folder)
    file.write_text("{")
    assert "not JSON" in refused(tiny_folder)


def test_end_tokens_come_from_the_most_specific_place(tiny_folder: Path) -> None:
    edit_json(tiny_folder / "generation_config.json", eos_token_id=[2, 0, 2])
    assert load_model(str(tiny_folder), CPU).eos_token_ids == (2, 0)
    edit_json(tiny_folder / "generation_config.json", eos_token_id=...)
    edit_json(tiny_folder / "config.json", eos_token_id=1)
    assert load_model(str(tiny_folder), CPU).eos_token_ids == (1,)
    edit_json(tiny_folder / "config.json", eos_token_id=None)
    assert load_model(str(tiny_folder), CPU).eos_token_ids == (2,)


def test_the_fingerprint_follows_weights_and_precision(tiny_folder: Path) -> None:
    first = load_model(str(tiny_folder), CPU).fingerprint
    assert load_model(str(tiny_folder), CPU).fingerprint == first
    half = load_model(str(tiny_folder), LoadConfig(device="cpu", dtype="bfloat16")).fingerprint
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, half, load_model(str(tiny_folder), CPU).fingerprint}) == 3


def test_the_package_imports_without_torch() -> None:
    program = (
        "import sys, cadenza.models, cadenza.models.source, cadenza.models.load\n"
        "from cadenza.models import ModelError, LoadConfig, cached_models, resolve\n"
        "sys.exit(', '.join({'torch', 'transformers', 'gguf', 'huggingface_hub'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.stderr.strip() == ""


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    import cadenza.models

    with pytest.raises(AttributeError, match="no_such"):
        _ = cadenza.models.no_such  # type: ignore[attr-defined]


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_group_size_that_nothing_uses_is_refused(tiny_folder: Path, quantization: Any) -> None:
    config = LoadConfig(device="cpu", quantization=quantization, quantization_group_size=64)
    expected = f"quantization_group_size 64 is for quantization int4 only, not for {quantization}"
    assert refused(tiny_folder, config) == expected
