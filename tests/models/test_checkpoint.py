"""What weight files say before they are loaded; damage and absence are found there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadenza.models import ModelError
from cadenza.models.checkpoint import open_checkpoint


def opened(folder: Path, allow_pickle: bool = False):  # type: ignore[no-untyped-def]
    return open_checkpoint(folder, allow_pickle=allow_pickle)


def test_sizes_and_types_are_those_of_the_tensors(tmp_path: Path) -> None:
    weights = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.float32),
        "c": torch.zeros(7, dtype=torch.int64),
        "empty": torch.zeros(0, dtype=torch.float16),
        "scalar": torch.tensor(1.0),
    }
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = opened(tmp_path)
    assert checkpoint.float_dtype == "bfloat16"
    floats = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    assert checkpoint.loaded_bytes(4) == 4 * floats + 7 * 8
    assert checkpoint.loaded_bytes(2) == 2 * floats + 7 * 8


def test_shards_count_together(sharded_folder: Path) -> None:
    checkpoint = opened(sharded_folder)
    assert len(checkpoint.files) == 2
    expected = sum(tensor.numel() for file in checkpoint.files for tensor in load_file(file).values())
    assert checkpoint.loaded_bytes(4) == 4 * expected


def test_a_missing_shard_is_named(sharded_folder: Path) -> None:
    (sharded_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files, such as model-00002"):
        opened(sharded_folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(sharded_folder: Path, index: str) -> None:
    (sharded_folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        opened(sharded_folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_found_in_its_header(tiny_folder: Path, kept: int) -> None:
    file = tiny_folder / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        _ = opened(tiny_folder).headers


@pytest.mark.parametrize("garbage", [b"not a tensor file at all", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_garbage_is_not_a_tensor_file(tiny_folder: Path, garbage: bytes) -> None:
    (tiny_folder / "model.safetensors").write_bytes(garbage)
    with pytest.raises(ModelError, match="damaged"):
        _ = opened(tiny_folder).headers


def test_no_weights_and_pickled_weights_are_refused(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        opened(tiny_folder)
    torch.save({"x": torch.zeros(2)}, tiny_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        opened(tiny_folder)
    assert opened(tiny_folder, allow_pickle=True).is_pickle


def test_the_digest_changes_with_names_and_values(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    first = opened(tiny_folder).digest()
    assert opened(tiny_folder).digest() == first
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1
    save_file(weights, file, metadata={"format": "pt"})
    second = opened(tiny_folder).digest()
    weights["model.norm.other"] = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert len({first, second, opened(tiny_folder).digest()}) == 3


def test_an_unknown_tensor_type_is_named(tiny_folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0"
    (tiny_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="type Q9"):
        _ = opened(tiny_folder).headers
