"""Adapters that are there from the start: all of them, in order, or the first reason why not."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.module import LoraModule
from cadenza.decoding.adapters.start import load_modules
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.errors import ModelError


def read(path: str) -> Adapter:
    content = (Path(path) / "adapter_model.safetensors").read_text()
    if content == "bad":
        raise ModelError("layer 0 has another shape")
    return Adapter(content, {}, 4, 100, base_model_name="from/adapter")


@pytest.fixture
def library() -> Iterator[AdapterLibrary]:
    library = AdapterLibrary(read, max_in_memory=2)
    yield library
    library.close()


def folder(root: Path, name: str, content: str = "") -> str:
    path = root / name
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_text(content or name)
    return str(path)


def test_all_of_them_in_order(library: AdapterLibrary, tmp_path: Path) -> None:
    modules = [LoraModule(name, folder(tmp_path, name)) for name in ("c", "a", "b")]
    load_modules(library, [*modules, LoraModule("again", modules[0].path, "base")])
    infos = library.list()
    assert [info.name for info in infos] == ["c", "a", "b", "again"]
    assert [info.digest for info in infos] == ["c", "a", "b", "c"]
    assert [info.base_model_name for info in infos] == [*["from/adapter"] * 3, "base"]


def test_one_that_is_not_there(library: AdapterLibrary, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^adapter x: there is no folder"):
        load_modules(library, [LoraModule("x", str(tmp_path / "nothing"))])


def test_one_that_cannot_be_served(library: AdapterLibrary, tmp_path: Path) -> None:
    modules = [LoraModule("a", folder(tmp_path, "a")), LoraModule("x", folder(tmp_path, "x", "bad"))]
    with pytest.raises(ModelError, match=r"^adapter x: layer 0 has another shape$"):
        load_modules(library, modules)


def test_the_engine_that_cannot_start_ends(fresh_tiny_model: object, tmp_path: Path) -> None:
    from cadenza.decoding import Engine, EngineConfig

    config = EngineConfig(
        enable_lora=True, lora_modules=(LoraModule("x", str(tmp_path)),), kv_cache_memory_gb=0.01
    )
    before = set(threading.enumerate())
    with pytest.raises(ModelError, match=r"^adapter x: .* holds no adapter_config.json"):
        Engine(fresh_tiny_model, config)  # type: ignore[arg-type]
    assert set(threading.enumerate()) <= before, "no thread of the engine's is left"
