"""Every flag reaches the configuration that it names; what is not said is left to the defaults there."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cadenza.decoding import EngineConfig
from cadenza.decoding.adapters.library import AdapterInfo
from cadenza.decoding.adapters.module import LoraModule
from cadenza.models import LoadConfig, ModelError
from cadenza.models.adapters.locate import AdapterSources
from cadenza.server.cli import build_parser
from cadenza.server.commands.adapters import check_adapters
from cadenza.server.commands.options import conversation_config, engine_config, load_config
from cadenza.server.commands.report import adapters_line
from cadenza.server.commands.serve import server_settings

LOADING: dict[str, tuple[list[str], Any]] = {
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "device": (["--device", "cpu"], "cpu"),
    "trust_remote_code": (["--trust-remote-code"], True),
    "allow_pickle": (["--allow-pickle"], True),
    "revision": (["--revision", "main"], "main"),
    "chat_template": (["--chat-template", "x.jinja"], "x.jinja"),
    "generation_config": (["--generation-config", "none"], "none"),
    "max_model_len": (["--max-model-len", "512"], 512),
    "quantization": (["--quantization", "int4"], "int4"),
    "quantization_group_size": (["--quantization-group-size", "64"], 64),
    "max_memory": (["--max-memory", "2GiB"], "2GiB"),
    "cpu_offload_gb": (["--cpu-offload-gb", "1.5"], 1.5),
    "offload_folder": (["--offload-folder", "somewhere"], "somewhere"),
}
ENGINE: dict[str, tuple[list[str], Any]] = {
    "max_num_seqs": (["--max-num-seqs", "8"], 8),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "1024"], 1024),
    "kv_cache_memory_gb": (["--kv-cache-memory-gb", "0.5"], 0.5),
    "block_size": (["--block-size", "32"], 32),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "max_queue": (["--max-queue", "9"], 9),
    "logprobs_mode": (["--logprobs-mode", "processed_logprobs"], "processed_logprobs"),
    "max_logprobs": (["--max-logprobs", "5"], 5),
    "seed": (["--seed", "1"], 1),
    "speculative": (["--speculative", "ngram"], "ngram"),
    "num_speculative_tokens": (["--num-speculative-tokens", "3"], 3),
    "enable_lora": (["--enable-lora"], True),
    "lora_modules": (["--lora-modules", "a=x"], (LoraModule("a", "x"),)),
    "max_loras": (["--enable-lora", "--max-loras", "3"], 3),
    "max_lora_rank": (["--enable-lora", "--max-lora-rank", "64"], 64),
    "max_cpu_loras": (["--enable-lora", "--max-cpu-loras", "99"], 99),
}


def serve(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", "some-model", *flags])


def test_no_setting_is_out_of_reach() -> None:
    assert set(LOADING) == {field.name for field in fields(LoadConfig)}
    assert set(ENGINE) == {field.name for field in fields(EngineConfig)}


def test_a_plan_takes_the_flags_of_serve() -> None:
    flags = [flag for group in (LOADING, ENGINE) for words, _ in group.values() for flag in words]
    planned = build_parser().parse_args(["plan", "some-model", *flags])
    assert load_config(planned) == load_config(serve(*flags))
    assert engine_config(planned) == engine_config(serve(*flags))


def test_silence_means_the_defaults() -> None:
    assert load_config(serve()) == LoadConfig()
    assert engine_config(serve()) == EngineConfig()


@pytest.mark.parametrize("name", LOADING)
def test_loading(name: str) -> None:
    flags, value = LOADING[name]
    assert load_config(serve(*flags)) == LoadConfig(**{name: value}) != LoadConfig()


@pytest.mark.parametrize("name", ENGINE)
def test_engine(name: str) -> None:
    flags, value = ENGINE[name]
    beside = {"enable_lora": True} if "lora" in name else {}
    config = engine_config(serve(*flags))
    assert config == EngineConfig(**{**beside, name: value})
    assert getattr(config, name) != getattr(EngineConfig(), name)


def test_names_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADENZA_API_KEY", "from-environment")
    assert server_settings(serve()).api_keys == ("from-environment",)
    settings = server_settings(serve("--api-key", "a", "b", "--served-model-name", "x", "y"))
    assert settings.api_keys == ("a", "b")
    assert settings.served_model_names == ("x", "y")
    monkeypatch.delenv("CADENZA_API_KEY")
    assert server_settings(serve()).api_keys == ()


@pytest.mark.parametrize(
    ("texts", "modules"),
    [
        (["a=x", "b/c=./y=z"], [LoraModule("a", "x"), LoraModule("b/c", "./y=z")]),
        (['{"name": "a", "path": "x"}'], [LoraModule("a", "x")]),
        (['{"name": "a", "path": "x", "base_model_name": "m"}'], [LoraModule("a", "x", "m")]),
    ],
)
def test_adapters_to_start_with(texts: list[str], modules: list[LoraModule]) -> None:
    assert engine_config(serve("--lora-modules", *texts)).lora_modules == tuple(modules)
    again = [word for text in texts for word in ("--lora-modules", text)]
    assert engine_config(serve(*again)).lora_modules == tuple(modules), "repeated flags add up"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "takes NAME=PATH"),
        ("a=", "empty path"),
        ("=x", "must not be empty"),
        ("a:b=x", "colons"),
        ("a b=x", "spaces"),
        ("a,b=x", "commas"),
        ("a" * 256 + "=x", "255"),
        ("{", "JSON"),
        ('{"name": "a"}', '"path"'),
        ('{"name": "a", "path": 1}', "text"),
        ('{"name": "a", "path": "x", "scale": "1"}', "base_model_name"),
    ],
)
def test_adapters_that_are_no_adapters(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve("--lora-modules", text)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--lora-modules" in last
    assert words in last


@pytest.mark.parametrize(
    "flags",
    [("--max-loras", "2"), ("--max-lora-rank", "8"), ("--max-cpu-loras", "9")],
)
def test_flags_of_adapters_need_adapters(flags: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match=f"^{flags[0]} needs --enable-lora"):
        engine_config(serve(*flags))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_loras": 0}, "max_loras must be at least 1, got 0"),
        ({"max_lora_rank": 0}, "max_lora_rank must be at least 1, got 0"),
        ({"max_loras": 9, "max_cpu_loras": 8}, "max_cpu_loras must be at least max_loras .9., got 8"),
        ({"lora_modules": (LoraModule("a", "x"), LoraModule("a", "y"))}, "lora_modules names a twice"),
    ],
)
def test_bounds_of_adapters(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        EngineConfig(enable_lora=True, **settings)


def test_more_adapters_than_slots_are_kept_in_memory() -> None:
    modules = tuple(LoraModule(f"a{number}", "x") for number in range(20))
    assert EngineConfig(enable_lora=True).adapters_in_memory == 16
    assert EngineConfig(enable_lora=True, lora_modules=modules).adapters_in_memory == 20
    assert EngineConfig(enable_lora=True, lora_modules=modules, max_cpu_loras=8).adapters_in_memory == 8


def test_who_may_change_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--enable-lora", "--admin-api-key", "x", "y", "--lora-allowed-roots", str(tmp_path))
    args = serve(*flags, "--lora-allowed-hub-ids", "org/a", "other/*")
    settings = server_settings(args)
    check_adapters(args, settings)
    assert settings.admin_api_keys == ("x", "y")
    assert settings.allows_updates
    assert settings.adapter_sources == AdapterSources((tmp_path,), ("org/a", "other/*"))
    monkeypatch.setenv("CADENZA_ADMIN_API_KEY", "from-environment")
    assert server_settings(serve()).admin_api_keys == ("from-environment",)
    assert server_settings(args).admin_api_keys == ("x", "y")


@pytest.mark.parametrize("prefix", ["CADENZA", "VLLM"])
@pytest.mark.parametrize(
    ("value", "allows"),
    [("1", True), ("true", True), (" True ", True), ("0", False), ("", False), ("no", False)],
)
def test_the_environment_may_allow_it(
    monkeypatch: pytest.MonkeyPatch, prefix: str, value: str, allows: bool
) -> None:
    for other in ("CADENZA", "VLLM"):
        monkeypatch.delenv(f"{other}_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    assert not server_settings(serve()).allows_updates
    monkeypatch.setenv(f"{prefix}_ALLOW_RUNTIME_LORA_UPDATING", value)
    assert server_settings(serve()).allows_updates is allows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora-allowed-roots", "."], "--lora-allowed-roots needs --enable-lora"),
        (["--lora-allowed-hub-ids", "org/a"], "--lora-allowed-hub-ids needs --enable-lora"),
        (
            ["--enable-lora", "--lora-allowed-roots", "."],
            "--lora-allowed-roots needs --admin-api-key, or CADENZA_ALL",
        ),
        (
            ["--enable-lora", "--lora-allowed-hub-ids", "org/a"],
            "--lora-allowed-hub-ids needs --admin-api-key, or",
        ),
        (
            ["--enable-lora", "--lora-allowed-roots", "/no/such"],
            "--lora-allowed-roots: there is no folder /no/such",
        ),
        (["--enable-lora", "--lora-allowed-hub-ids", "*"], "is no Hugging Face id"),
        (["--lora-modules", "some-model=x"], "--lora-modules: some-model is what the served model is called"),
        (
            ["--lora-modules", "b=x", "--served-model-name", "a", "b"],
            "--lora-modules: b is what the served model is called",
        ),
        (
            ["--lora-modules", '{"name": "x", "path": "x", "base_model_name": "y"}'],
            "--lora-modules: the base model of x is y, which is not served here .some-model is.",
        ),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    for name in ("CADENZA_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    args = serve(*flags)
    with pytest.raises(ModelError, match=words):
        check_adapters(args, server_settings(args))


def test_the_base_model_of_an_adapter_is_one_of_the_served_names() -> None:
    module = '{"name": "x", "path": "x", "base_model_name": "b"}'
    args = serve("--lora-modules", module, "--served-model-name", "a", "b")
    check_adapters(args, server_settings(args))


def test_a_conversation_with_adapters() -> None:
    def run(*flags: str) -> EngineConfig:
        return conversation_config(build_parser().parse_args(["run", "some-model", *flags]))

    assert run() == EngineConfig(max_num_seqs=1)
    config = run("--lora", "some/folder", "org/name", "--max-lora-rank", "64")
    assert [module.path for module in config.lora_modules] == ["some/folder", "org/name"]
    assert [module.name for module in config.lora_modules] == ["folder", "name"], "as messages call them"
    assert (config.enable_lora, config.max_loras, config.max_lora_rank) == (True, 2, 64)
    for paths in (("a/x", "b/x"), ("some folder", "x"), ("..", "/")):
        assert [module.name for module in run("--lora", *paths).lora_modules] == ["lora-1", "lora-2"]
    with pytest.raises(ModelError, match="--max-lora-rank needs --lora"):
        run("--max-lora-rank", "64")


def test_the_report_says_which_adapters_there_are() -> None:
    def info(number: int) -> AdapterInfo:
        return AdapterInfo(
            name=f"a{number}",
            generation=1,
            digest=f"{number % 10}",
            path="x",
            base_model_name=None,
            rank=number,
            num_bytes=1024**2,
            is_pinned=False,
            is_in_memory=True,
            num_users=0,
            previous_generation=None,
            created=0,
        )

    config = EngineConfig(enable_lora=True)
    bounds = "8 in a step, 16 in memory, of rank 16 or less"
    assert adapters_line(EngineConfig(), []) is None
    assert adapters_line(config, []) == f"none yet; {bounds}"
    assert adapters_line(config, [info(4), info(8)]) == f"a4 (rank 4), a8 (rank 8), 2.00 MiB; {bounds}"
    many = adapters_line(config, [info(number) for number in range(20)])
    assert many is not None
    assert many.endswith(f"a7 (rank 7) and 12 more, 10.00 MiB; {bounds}"), "equal content is counted once"
