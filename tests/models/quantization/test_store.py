"""The quantized cache under attack: processes at once, killed, full disks, damaged files, changed checkpoints."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.models import cache as cache_module
from cadenza.models.architecture import read_config
from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.errors import ModelError
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.quantization import store
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.rotation import rotate_weight
from cadenza.models.source import quantized_copies
from cadenza.models.weights import FileWeights

NUM_MATRICES = 2 * 7 + 2  # the head and the embedding, too, though they are one tensor
MIB = 2**20


class Counting(Int8):
    def __init__(self) -> None:
        self.count = 0

    def quantize(self, weight: Tensor) -> Mapping[str, Tensor]:
        self.count += 1
        return super().quantize(weight)


def module_source(folder: Path, dtype: torch.dtype = torch.float32) -> ModuleSource:
    return ModuleSource(
        "tiny",
        folder,
        open_checkpoint(folder, allow_pickle=False),
        LlamaForCausalLM,
        read_config(folder, trust_remote_code=False),
        dtype,
        torch.device("cpu"),
        False,
    )


def load(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """(matrices that were quantized for it, the loaded model's tensors)"""
    method = Counting()
    module = load_module(module_source(folder), method)
    return method.count, module.state_dict()


def folder_of(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return store.store_folder(folder, open_checkpoint(folder, allow_pickle=False), Int8(), dtype)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# several processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What store_workers.py saw, and what a model that was loaded alone is."""
    root = tmp_path_factory.mktemp("processes")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    script = Path(__file__).with_name("store_workers.py")
    command = [sys.executable, str(script), str(root / "model"), str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120, env=environment).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def test_of_two_processes_on_an_empty_cache_one_quantizes_and_both_load(outcomes: dict[str, Any]) -> None:
    (first, one), (second, other) = outcomes["together"]
    assert sorted([first, second]) == [0, NUM_MATRICES - 1]  # an embedding is not counted
    assert one == other
    assert len(one) == 64


def test_what_a_killed_process_leaves_is_neither_trusted_nor_kept(outcomes: dict[str, Any]) -> None:
    killed = outcomes["killed"]
    assert [name[0] for name in killed["left"]] == ["."], "nothing was published"
    assert killed["later"] == [NUM_MATRICES - 1, outcomes["together"][0][1]]
    assert [name[0] == "." for name in killed["then"]] == [False]


def test_a_disk_that_fills_up_while_writing(outcomes: dict[str, Any]) -> None:
    count, error = outcomes["full"]["outcome"]
    assert 0 < count < NUM_MATRICES
    assert error.startswith("ModelError: cannot write ")
    assert "File too large" in error
    assert error.endswith("GB are free there")
    assert outcomes["full"]["then"] == []


# one process


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def truncate(folder: Path) -> None:
    file = folder / store.FILE
    os.truncate(file, file.stat().st_size - 1)


def flip_in_header(folder: Path) -> None:
    file = folder / store.FILE
    flip(file, file.read_bytes().index(b"I8"))


def flip_in_data(folder: Path) -> None:
    file = folder / store.FILE
    flip(file, file.stat().st_size - 100)


def flip_and_turn_back_the_clock(folder: Path) -> None:
    before = (folder / store.FILE).stat()
    flip_in_data(folder)
    os.utime(folder / store.FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / store.FILE).stat().st_mtime_ns == before.st_mtime_ns


def remove_weights(folder: Path) -> None:
    (folder / store.FILE).unlink()


def remove_manifest(folder: Path) -> None:
    (folder / cache_module.MANIFEST).unlink()


def damage_manifest(folder: Path) -> None:
    os.truncate(folder / cache_module.MANIFEST, 40)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_in_header,
        flip_in_data,
        flip_and_turn_back_the_clock,
        remove_weights,
        remove_manifest,
        damage_manifest,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_folder_is_made_again(
    damage: Callable[[Path], None], tiny_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count, expected = load(tiny_folder)
    assert count == NUM_MATRICES - 1
    assert load(tiny_folder)[0] == 0, "the second start reads"

    damage(folder_of(tiny_folder))
    with caplog.at_level(logging.WARNING):
        count, actual = load(tiny_folder)
    assert count == NUM_MATRICES - 1
    assert same(actual, expected)
    assert ("is damaged, and is not used" in caplog.text) == damage.__name__.startswith("flip")
    assert load(tiny_folder)[0] == 0


def test_a_folder_of_other_tensors_is_made_again(tiny_folder: Path, cache: Path) -> None:
    """As another transformers would have named or shaped them: no code is in the folder's name."""
    _, expected = load(tiny_folder)
    tensors = load_file(folder_of(tiny_folder) / store.FILE)
    tensors["model.renamed.scale"] = tensors.pop("model.layers.0.mlp.up_proj.scale")
    cache_module.build_folder(
        folder_of(tiny_folder), {"name": "tiny"}, lambda folder: save_file(tensors, folder / store.FILE)
    )
    count, actual = load(tiny_folder)
    assert count == NUM_MATRICES - 1
    assert same(actual, expected)
    assert load(tiny_folder)[0] == 0


def test_the_digest_is_computed_once_for_an_untouched_file(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load(tiny_folder)
    read: list[Path] = []
    sha256_of = cache_module.sha256_of
    monkeypatch.setattr(cache_module, "sha256_of", lambda file: read.append(file) or sha256_of(file))
    load(tiny_folder)
    assert read == [], "a start does not read what it need not"

    moved = tmp_path / "moved"
    shutil.copytree(cache, moved)
    monkeypatch.setenv("CADENZA_CACHE", str(moved))
    assert load(tiny_folder)[0] == 0
    assert [file.name for file in read] == [store.FILE], "a copy is checked"
    read.clear()
    load(tiny_folder)
    assert read == []


def test_another_checkpoint_dtype_or_configuration_gets_another_folder(
    tiny_folder: Path, cache: Path
) -> None:
    first = folder_of(tiny_folder)
    assert folder_of(tiny_folder) == first
    assert folder_of(tiny_folder, torch.bfloat16) != first

    file = tiny_folder / "model.safetensors"
    before = file.stat()
    flip(file, before.st_size - 9)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same name, size and time
    second = folder_of(tiny_folder)
    assert second != first
    flip(file, before.st_size - 9)
    assert folder_of(tiny_folder) == first

    configuration = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(configuration | {"rms_norm_eps": 1e-3}))
    assert folder_of(tiny_folder) not in (first, second)


def test_too_little_room_is_told_with_the_numbers(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10_000, 10_000))
    with pytest.raises(
        ModelError, match=r"quantizing tiny writes 0\.00 GB to .*cache, where 0\.00 GB are free"
    ):
        load(tiny_folder)
    assert not list((cache / "quantized").iterdir())


def test_a_cache_that_cannot_be_made(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"the model cache .*file/cache cannot be written: Not a directory"):
        load(tiny_folder)


def test_a_cache_that_can_only_be_read_is_read(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_folder)
    (cache / "digests.json").unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert load(tiny_folder)[0] == 0


def test_remains_of_others_go_unless_they_are_at_work(tiny_folder: Path, cache: Path) -> None:
    dead, alive = cache / "quantized" / ".dead.tmp-1", cache / "quantized" / ".alive.tmp-2"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / store.FILE).write_bytes(b"12345")
    (cache / "locks").mkdir()
    with FileLock(cache / "locks" / "alive.lock"):
        load(tiny_folder)
    assert not dead.exists()
    assert alive.exists()

    copies = {copy.name: copy for copy in quantized_copies()}
    assert copies[f"tiny ({Int8().key})"].path == folder_of(tiny_folder)
    assert copies[f"tiny ({Int8().key})"].bytes == (folder_of(tiny_folder) / store.FILE).stat().st_size
    assert copies["(unfinished)"].path == alive
    assert copies["(unfinished)"].bytes == 5


# what is written


def test_the_stored_tensors_are_the_checkpoints_rounded(
    tiny_folder: Path, tiny_model: LlamaForCausalLM, cache: Path
) -> None:
    load(tiny_folder)
    original = tiny_model.state_dict()
    found = 0
    with safe_open(folder_of(tiny_folder) / store.FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            layer, _, last = name.rpartition(".")
            if last == "qweight":
                weight = original[f"{layer}.weight"].double()
                weight = weight if "embed_tokens" in name else rotate_weight(weight).double()
                scale = weight.abs().amax(1, keepdim=True) / 127
                assert torch.equal(file.get_tensor(name), (weight / scale).round().to(torch.int8)), name
                torch.testing.assert_close(file.get_tensor(f"{layer}.scale").double(), scale[:, 0])
                found += 1
            elif last == "weight":
                assert torch.equal(file.get_tensor(name), original[name]), name
    assert found == NUM_MATRICES


def test_what_write_safetensors_writes_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "one": torch.arange(6, dtype=torch.float32).view(2, 3),
        "odd": torch.arange(5, dtype=torch.int8),
        "transposed": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "number": torch.tensor(3.5, dtype=torch.float16),
        "nothing": torch.empty(0, 4, dtype=torch.float64),
        "fp8": torch.arange(8, dtype=torch.float32).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(3) - 2**40,
        "bytes": torch.arange(256, dtype=torch.uint8),
        "names with spaces, \u00fcmlauts": torch.ones(1, dtype=torch.int32),
    }
    file = tmp_path / "model.safetensors"
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    store.write_safetensors(file, shapes, iter(tensors.items()))

    ours = FileWeights.of_safetensors([file])
    with safe_open(file, framework="pt") as theirs:
        assert set(theirs.keys()) == set(ours) == set(tensors)
        for name, tensor in tensors.items():
            for read in (theirs.get_tensor(name), ours[name]):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert read.contiguous().flatten().view(torch.uint8).tolist() == (
                    tensor.contiguous().flatten().view(torch.uint8).tolist()
                ), name
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.int8)])
def test_a_tensor_of_another_kind_than_announced_is_not_written(wrong: Tensor, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        store.write_safetensors(
            tmp_path / "file", {"a": torch.zeros(3, 2, device="meta")}, iter([("a", wrong)])
        )


def test_quantizing_and_loading_take_the_memory_of_the_outcome_and_one_tensor(
    tmp_path: Path, cache: Path, peak_growth: Callable[[Callable[[], object]], int]
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    parameters, largest = sum(p.numel() for p in model.parameters()), 8192 * 512
    del model
    source = module_source(tmp_path / "model")
    target = store.store_folder(source.folder, source.checkpoint, Int8(), torch.float32)
    kept: list[Any] = []
    for _start in ("first", "second"):
        growth = peak_growth(lambda: kept.append(load_module(source, Int8())))
        assert target.is_dir()
        assert growth < 1.05 * parameters + 12 * largest < 2 * parameters
        kept.clear()
