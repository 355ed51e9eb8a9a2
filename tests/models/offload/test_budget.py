"""Sizes as people write them, and settings that are refused by name."""

import argparse
from pathlib import Path

import pytest

from cadenza.models import LoadConfig, ModelError, load_model
from cadenza.models.offload.budget import Limits, StepNeeds, limits, parse_max_memory, parse_size, size_text
from cadenza.server.commands.options import add_loading, load_config


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 1024**3),
        ("1500MB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("10KiB", 10240),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "2 gibs", "1e9", "0", "0.1B", "two", "9" * 400, "9999999999TiB"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ModelError, match=r"^max_memory: "):
        parse_size(text, "max_memory")


def test_sizes_by_device() -> None:
    assert parse_max_memory("2GiB", "cpu") == {"cpu": 2**31}
    assert parse_max_memory("cpu=2GiB", "cpu") == {"cpu": 2**31}
    assert parse_max_memory("20GB", "cuda:1") == {"cuda:1": 20 * 10**9}
    both = {"cuda:0": 20 * 10**9, "cpu": 30 * 10**9}
    assert parse_max_memory("cuda:0=20GB,cpu=30GB", "cuda:0") == both
    assert parse_max_memory("0=20GB, cpu=30GB", "cuda:0") == both
    for text, device, reason in [
        ("cuda:1=2GB", "cuda:0", "names cuda:1, where nothing is kept"),
        ("cuda:0=2GB", "cpu", "names cuda:0"),
        ("2GB,cpu=1GB", "cpu", "names cpu twice"),
    ]:
        with pytest.raises(ModelError, match=reason):
            parse_max_memory(text, device)


def test_limits_are_honoured_or_refused() -> None:
    assert limits(None, 0.0, None, "cpu", StepNeeds()) is None
    found = limits("cuda:0=2GiB,cpu=1GiB", 0.5, "/somewhere", "cuda", StepNeeds())
    assert found == Limits(2**31, 2**30, 2**29, Path("/somewhere"))
    assert limits("1GiB", 0.0, None, "cpu", StepNeeds()) == Limits(2**30, None, 0, None)
    for arguments, reason in [
        ((None, 1.0, None, "cpu"), "^cpu_offload_gb: the model computes on the CPU"),
        ((None, -1.0, None, "cuda:0"), "^cpu_offload_gb must not be negative"),
        ((None, float("nan"), None, "cuda:0"), "^cpu_offload_gb"),
        ((None, float("inf"), None, "cuda:0"), "^cpu_offload_gb must not be negative or infinite"),
        ((None, 0.0, "/somewhere", "cpu"), "^offload_folder: nothing is offloaded"),
    ]:
        with pytest.raises(ModelError, match=reason):
            limits(*arguments, StepNeeds())


def test_flags_reach_the_loader(tiny_folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_loading(parser)
    flags = ["--max-memory", "3GiB", "--cpu-offload-gb", "2", "--offload-folder", "there"]
    config = load_config(parser.parse_args(flags))
    assert (config.max_memory, config.cpu_offload_gb, config.offload_folder) == ("3GiB", 2.0, "there")
    with pytest.raises(ModelError, match="cpu_offload_gb"):
        load_model(str(tiny_folder), LoadConfig(device="cpu", cpu_offload_gb=2.0))


def test_what_does_not_fit_says_what_would_help(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("it does not fit")

    monkeypatch.setattr("cadenza.models.module.require_memory", refuse)
    with pytest.raises(ModelError, match=r"^it does not fit; --quantization int8 .* --max-memory "):
        load_model(str(tiny_folder), LoadConfig(device="cpu"))


def test_sizes_are_told_in_units_that_fit() -> None:
    assert [size_text(size) for size in (10, 3 * 2**20, 12 * 2**20, 2**31)] == [
        "10 bytes",
        "3.00 MiB",
        "12.0 MiB",
        "2.00 GiB",
    ]
