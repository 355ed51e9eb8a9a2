"""`cadenza plan` says what `serve` does later, to the byte and the token, and refuses what it refuses."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cadenza.decoding import Engine
from cadenza.models import LoadedModel, hub
from cadenza.models.memory import Memory
from cadenza.server.cli import build_parser, main
from cadenza.server.commands.options import engine_config, load_config

GIB = 1024**3
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES | {"tie_word_embeddings": True},
    "Qwen2": SIZES | {"max_position_embeddings": 512},
    "Gemma": SIZES | {"head_dim": 24},
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2},
    "Mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}
FLAGS = ["--device", "cpu", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]


@pytest.fixture(scope="module")
def folder_of(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models that read the default model's vocabulary."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        config = getattr(transformers, f"{name}Config")(vocab_size=smollm2.config.vocab_size, **MODELS[name])
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in smollm2.path.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return make


def planned(capsys: pytest.CaptureFixture[str], model: str | Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["plan", str(model), "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("Llama", []),
        ("Qwen2", ["--kv-cache-memory-gb", "0.0005", "--dtype", "bfloat16"]),
        ("Gemma", ["--max-model-len", "100"]),
        ("GPT2", ["--block-size", "32"]),
        ("Mixtral", ["--speculative", "ngram"]),
        ("Llama", ["--max-memory", "17MiB"]),
        ("Qwen2", ["--max-memory", "30MiB", "--quantization", "int8"]),
        ("Gemma", ["--quantization", "int4"]),
    ],
)
def test_a_plan_is_what_the_engine_does(
    name: str,
    flags: list[str],
    folder_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path))
    folder = folder_of(name)
    plan = planned(capsys, folder, *FLAGS, *flags)
    args = build_parser().parse_args(["serve", str(folder), *FLAGS, *flags])
    with Engine.load(args.model, load_config(args), engine_config(args)) as engine:
        serve, memory = plan["serve"], engine.memory
        assert plan["kv_cache"]["bytes_per_token"] == memory.demand.bytes_per_token
        assert plan["model"]["parameters"]["total"] == engine.model.num_parameters
        resident = (serve["offload"] or {"resident_bytes": serve["weight_bytes"]})["resident_bytes"]
        assert resident == engine.model.weight_bytes
        on_disk = (serve["offload"] or {"disk_bytes": 0})["disk_bytes"]
        assert on_disk == engine.description.offloaded_bytes
        assert (on_disk > 0) == ("17MiB" in flags)
        assert serve["kv_cache_tokens"] == engine.num_kv_tokens
        assert serve["kv_cache_bytes"] == memory.num_bytes
        assert serve["max_model_len"] == engine.max_model_len
        assert serve["full_length_concurrency"] == memory.full_length_concurrency
        assert (serve["kv_cache_reason"], serve["max_model_len_reason"]) == (
            memory.reason,
            memory.context_reason,
        )
        assert serve["dtype"] == str(engine.model.dtype).removeprefix("torch.")
        assert serve["step_bytes"] == memory.demand.step_bytes


def test_a_draft_model_is_counted(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folder_of("Llama"))
    alone, helped = planned(capsys, folder), planned(capsys, folder, "--speculative", folder)
    assert helped["serve"]["kv_cache_bytes"] == 2 * alone["serve"]["kv_cache_bytes"]
    assert helped["serve"]["draft"] == Path(folder).name


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
NUM_SHARDS = 30


@pytest.fixture(scope="module")
def seventy_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All headers of a 70B checkpoint; where its 141 GB of weights would be, the files have holes."""
    folder = tmp_path_factory.mktemp("seventy")
    config = transformers.LlamaConfig(**LLAMA_70B)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = transformers.LlamaForCausalLM(config).state_dict()
    names, places = list(tensors), {}
    for shard in range(NUM_SHARDS):
        file, end, header = f"model-{shard:05}.safetensors", 0, {}
        for name in names[shard::NUM_SHARDS]:
            start, end = end, end + 2 * tensors[name].numel()
            header[name] = {
                "dtype": "BF16",
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
            places[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def sixteen_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(14 * GIB, 16 * GIB, "a test")
    monkeypatch.setattr("cadenza.models.memory.memory_of", lambda device: memory)
    monkeypatch.setattr("cadenza.decoding.planning.memory_of", lambda device: memory)


@pytest.mark.usefixtures("sixteen_gib")
def test_seventy_billion_parameters_without_reading_them(
    seventy_billion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_before = bytes_read()
    plan = planned(capsys, seventy_billion, "--device", "cpu")
    assert bytes_read() - read_before < 50 * 1024**2
    parameters = plan["model"]["parameters"]
    assert parameters["total"] == 70_553_706_496  # as its model card has it
    assert parameters["layers"] == [855_654_400] * 80
    assert plan["model"]["checkpoint_dtype"] == "bfloat16"
    assert plan["kv_cache"]["bytes_per_token"] == 2 * 80 * 8 * 128 * 4
    bytes_of = {row["name"]: row["weight_bytes"] for row in plan["precisions"]}
    assert 4 * parameters["total"] <= bytes_of["float32"] < 4 * parameters["total"] + 4096
    assert 2 * parameters["total"] <= bytes_of["bfloat16"] < 2 * parameters["total"] + 4096
    assert parameters["total"] < bytes_of["int8"] < 1.01 * parameters["total"]
    assert plan["serve"]["refusal"] == (
        f"{seventy_billion.name} does not fit: its weights take 262.83 GiB, cpu has 14.00 GiB free of 16.00 (a test)"
    )
    assert plan["serve"]["alternative"] is None


def bytes_read() -> int:
    """By this process, wherever they came from."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def test_a_precision_that_fits_is_offered(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("Qwen2")
    rows = {row["name"]: row["weight_bytes"] for row in planned(capsys, folder)["precisions"]}
    flags = [*FLAGS, "--max-num-seqs", "1"]

    def with_free(free: int) -> dict[str, Any]:
        memory = Memory(free, GIB, "a test")
        monkeypatch.setattr("cadenza.models.memory.memory_of", lambda device: memory)
        return planned(capsys, folder, *flags)

    assert with_free(rows["float32"] + 16 * 1024**2)["serve"]["refusal"] is None
    plan = with_free(rows["float32"] - 1024**2)
    assert "does not fit: its weights take" in plan["serve"]["refusal"]
    fitting = [row for row in plan["precisions"] if row["refusal"] is None]
    assert fitting
    best = max(fitting, key=lambda row: row["weight_bytes"])
    assert plan["serve"]["alternative"] == best["name"]
    assert main(["plan", str(folder), *flags]) == 1
    table = capsys.readouterr().out
    assert f"would refuse: {plan['serve']['refusal'][:40]}" in table
    assert f"it would take {best['name']}" in table
    no_room = with_free(rows["float32"] + 4096)
    assert "at least 128 are needed" in no_room["serve"]["refusal"]


def test_adapters_are_counted_and_have_to_be_there(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, flags = folder_of("Llama"), ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "17"]
    plain, plan = planned(capsys, folder, *FLAGS)["serve"], planned(capsys, folder, *FLAGS, *flags)["serve"]
    ranks = 3 * 32  # tables are made in planes of 16 ranks
    per_rank = 2 * (4 * 64 + 64 + 2 * 32 + 64) + 2 * (3 * 64 + 3 * 96)  # q, k, v, o, then gate, up, down
    assert plan["adapter_bytes"] == ranks * per_rank * 4
    assert plan["step_bytes"] - plain["step_bytes"] == plan["adapter_bytes"]
    assert plain["adapter_bytes"] == 0
    assert main(["plan", str(folder), *FLAGS, *flags]) == 0
    assert "for 3 in a step, of rank 17 or less" in capsys.readouterr().out
    assert main(["plan", str(folder), *FLAGS, "--lora-modules", f"x={tmp_path / 'nothing'}"]) == 1
    assert "adapter x: there is no folder" in capsys.readouterr().err


KEYS = {
    "": {"model", "machine", "kv_cache", "precisions", "serve"},
    "model": {
        *("name", "location", "architecture", "checkpoint_dtype", "checkpoint_quantization", "note"),
        *("context_length", "parameters"),
    },
    "kv_cache": {"bytes_per_token", "bytes_per_full_context", "layers"},
}
ROW = {
    *("name", "dtype", "quantization", "group_size", "weight_bytes", "weight_bytes_in_use", "adapter_bytes"),
    *(
        "full_precision_bytes",
        "offload",
        "refusal",
        "step_bytes",
        "kv_cache_bytes",
        "kv_cache_tokens",
        "kv_cache_reason",
    ),
    *("max_model_len", "max_model_len_reason", "max_num_seqs", "full_length_concurrency"),
    "full_concurrency_length",
}


def test_the_keys_are_stable(folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, folder_of("GPT2"), "--device", "cpu")
    assert set(plan) == KEYS[""]
    for part in ("model", "kv_cache"):
        assert set(plan[part]) == KEYS[part]
    assert set(plan["machine"]["cpu"]) == {"free_bytes", "total_bytes", "bound"}
    assert all(set(row) == ROW for row in plan["precisions"])
    assert set(plan["serve"]) == ROW | {"device", "dtype_reason", "draft", "alternative"}
    names = [row["name"] for row in plan["precisions"]]
    assert names[:4] == ["float32", "bfloat16", "float16", "int8"]
    assert [name for name in names if name.startswith("int4")] == [
        f"int4, groups of {size}" for size in (32, 64, 128)
    ]


def test_the_table_says_the_same(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("Mixtral")
    plan = planned(capsys, folder, *FLAGS, "--quantization", "int8")
    assert main(["plan", str(folder), *FLAGS, "--quantization", "int8"]) == 0
    table = capsys.readouterr().out
    assert "MixtralForCausalLM" in table
    assert "active per token" in table
    assert "routers, which decide by small differences" in table
    assert f"{plan['serve']['kv_cache_tokens']} tokens" in table
    assert f"4 of {plan['serve']['max_model_len']} tokens (max_num_seqs)" in table
    assert "int8 *" in table


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["plan", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_serve_refuses_is_refused_in_its_words(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = folder_of("Llama")
    assert "--max-model-len 257 exceeds the 256" in refused(capsys, str(folder), "--max-model-len", "257")
    assert "max_num_seqs must be at least 1" in refused(capsys, str(folder), "--max-num-seqs", "0")
    config = transformers.FalconConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=512
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "falcon")
    assert "0 of 2 layers use transformers' attention interface" in refused(capsys, str(tmp_path / "falcon"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged: it has" in refused(capsys, str(folder))
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert "does not begin with a safetensors header" in refused(capsys, str(folder))
    weights.unlink()
    assert "holds no weights" in refused(capsys, str(folder))
    assert "neither a folder with a config.json nor a .gguf file" in refused(capsys, str(tmp_path))


def test_too_much_kv_cache_is_refused_with_the_numbers(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folder_of("Llama"))
    plan = planned(capsys, folder, "--device", "cpu", "--kv-cache-memory-gb", "100000")
    assert "--kv-cache-memory-gb 100000.00 is more than cpu can give" in plan["serve"]["refusal"]
    assert plan["serve"]["weight_bytes"] is not None


def test_a_model_that_only_the_hub_has(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration and headers come over the network, which this test stands in for; nothing else is asked."""
    from cadenza.models.checkpoint import read_header

    folder = folder_of("Qwen2")
    local = planned(capsys, folder)
    table, _ = read_header(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, revision: folder)
    monkeypatch.setattr(hub, "headers", lambda repo, **_: (folder, {"model.safetensors": table}))
    remote = planned(capsys, "someone/model")
    assert remote["model"]["location"] == "huggingface.co/someone/model"
    assert remote["precisions"] == local["precisions"] or _same_but_free(remote, local)


def _same_but_free(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(one["precisions"], other["precisions"], strict=True)
    return all(mine["weight_bytes"] == theirs["weight_bytes"] for mine, theirs in pairs)


def test_an_alias_that_is_not_here_is_not_fetched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path))
    assert "`cadenza pull smollm2` fetches it" in refused(capsys, "smollm2")
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_nothing_uses_is_refused_as_serve_does(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("Qwen2")
    assert main(["plan", str(folder), "--quantization", "int8", "--quantization-group-size", "64"]) != 0
    assert "quantization_group_size 64 is for quantization int4 only" in capsys.readouterr().err
