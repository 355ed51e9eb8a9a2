"""An outline is what the loaded model says of itself; a GGUF file has one before it is converted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cadenza.models import LoadConfig, ModelError, load_model
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
