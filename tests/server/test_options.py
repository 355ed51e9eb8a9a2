"""Every flag reaches the configuration that it names; what is not said is left to the defaults there."""

import argparse
from dataclasses import fields
from typing import Any

import pytest

from cadenza.decoding import EngineConfig
from cadenza.models import LoadConfig
from cadenza.server.cli import build_parser
from cadenza.server.commands.options import engine_config, load_config
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
    assert engine_config(serve(*flags)) == EngineConfig(**{name: value}) != EngineConfig()


def test_names_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADENZA_API_KEY", "from-environment")
    assert server_settings(serve()).api_keys == ("from-environment",)
    settings = server_settings(serve("--api-key", "a", "b", "--served-model-name", "x", "y"))
    assert settings.api_keys == ("a", "b")
    assert settings.served_model_names == ("x", "y")
    monkeypatch.delenv("CADENZA_API_KEY")
    assert server_settings(serve()).api_keys == ()
