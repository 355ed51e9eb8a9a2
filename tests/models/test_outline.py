"""An outline is what the loaded model says of itself; a GGUF file has one before it is converted."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError
from huggingface_hub.utils import TensorInfo

from cadenza.models import LoadConfig, ModelError, load_model
from cadenza.models.checkpoint import read_header
from cadenza.models.outline import outline
from cadenza.models.sizing import count_parameters, sized_module, weight_sizes

CPU = torch.device("cpu")


def test_a_gguf_file_is_outlined_as_it_will_be_converted(
    write_gguf: Callable[..., Path], cache: Path
) -> None:
    file = write_gguf()
    found = outline(str(file))
    assert not cache.exists()
    assert found.name == "tiny"
    assert found.checkpoint.float_dtype == "float32"
    assert found.note is not None
    assert found.note.startswith("GGUF")
    module = sized_module(found.model_class, found.config, torch.float32, None)
    loaded = load_model(str(file), LoadConfig(device="cpu"))
    assert count_parameters(module).total == loaded.num_parameters
    assert weight_sizes(module, CPU, torch.float32, is_quantized=False).total == loaded.weight_bytes
    assert found.checkpoint.loaded_bytes(4) == 4 * loaded.num_parameters
    for name in ("max_position_embeddings", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(found.text_config, name) == getattr(loaded.config, name)


def test_shards_are_one_checkpoint(sharded_folder: Path) -> None:
    found = outline(str(sharded_folder))
    assert len(found.checkpoint.files) == 2
    module = sized_module(found.model_class, found.config, torch.float32, None)
    assert found.checkpoint.loaded_bytes(4) == 4 * count_parameters(module).total


def test_the_method_of_a_quantized_checkpoint_is_named(tiny_folder: Path) -> None:
    assert outline(str(tiny_folder)).quantized_by is None
    config = (tiny_folder / "config.json").read_text()
    (tiny_folder / "config.json").write_text(
        config.rstrip().removesuffix("}") + ', "quantization_config": {"quant_method": "gptq", "bits": 4}}'
    )
    assert outline(str(tiny_folder)).quantized_by == "GPTQ 4-bit"


def test_what_no_reader_knows_is_refused(tiny_folder: Path) -> None:
    config = (tiny_folder / "config.json").read_text()
    (tiny_folder / "config.json").write_text(
        config.rstrip().removesuffix("}") + ', "quantization_config": {"quant_method": "sorcery"}}'
    )
    with pytest.raises(ModelError, match="'sorcery', which cannot be read here"):
        outline(str(tiny_folder))


class Hub:
    """Stands in for the network: one repository, of which only the configuration can be fetched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[list[str]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", self.get_safetensors_metadata)

    def snapshot_download(self, repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        self.asked.append(options["allow_patterns"])
        return str(self.folder)

    def get_safetensors_metadata(self, repo: str, *, revision: str | None = None) -> Any:
        if self.error is not None:
            raise self.error
        table, _ = read_header(self.folder / "model.safetensors")
        tensors = {
            name: TensorInfo(entry["dtype"], entry["shape"], tuple(entry["data_offsets"]))
            for name, entry in table.items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})


def test_of_the_hub_only_configuration_and_headers_are_asked(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tiny_folder, monkeypatch)
    found, local = outline("someone/tiny"), outline(str(tiny_folder))
    assert hub.asked == [["config.json"]]
    assert found.location == "huggingface.co/someone/tiny"
    assert list(found.checkpoint.headers.values()) == list(local.checkpoint.headers.values())
    assert found.checkpoint.loaded_bytes(2) == local.checkpoint.loaded_bytes(2)
    assert found.text_config.to_dict() == local.text_config.to_dict()


def test_what_the_hub_cannot_tell_is_one_line(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tiny_folder, monkeypatch)
    hub.error = NotASafetensorsRepoError("no")
    with pytest.raises(ModelError, match="someone/tiny holds no safetensors; pull it"):
        outline("someone/tiny")
    hub.error = OSError("the wire is cut\nand more")
    with pytest.raises(ModelError, match="could not be fetched from Hugging Face: the wire is cut"):
        outline("someone/tiny")


@pytest.mark.parametrize("source", ["nowhere/at/all", "./none"])
def test_what_is_not_there_is_told(source: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a folder with a config\.json nor a \.gguf file"):
        outline(source)


def test_revisions_exist_on_the_hub_only(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="no revisions"):
        outline(str(tiny_folder), revision="main")


def test_a_gguf_file_that_is_not_there_is_no_hub_id(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file missing\.gguf"):
        outline("missing.gguf")
