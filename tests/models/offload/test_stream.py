"""A model whose layers come and go computes what the same model computes with all of them in memory, bit for bit."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cadenza.decoding import probe
from cadenza.models.module import ModuleSource
from cadenza.models.offload.dispatch import dispatch
from cadenza.models.offload.placement import Placement
from cadenza.models.offload.stream import StreamedLayer, streams_of
from cadenza.models.skeleton import open_skeleton

from .conftest import CPU, IDS, MODELS, budgets, loaded, logits_before_and_after_packing

Sources = Callable[..., ModuleSource]


def layers_away(module: Any) -> int:
    return sum(
        where == "disk" for name, where in module.hf_device_map.items() if name.rpartition(".")[2].isdigit()
    )


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_are_those_of_the_resident_model(source_of: Sources, name: str, quantization: str) -> None:
    expected = logits_before_and_after_packing(loaded(source_of(name), quantization))
    all_away, half_away = (
        loaded(source_of(name, budget), quantization) for budget in budgets(source_of(name), quantization)
    )
    assert (layers_away(all_away), layers_away(half_away)) == (5, 3)
    for module in (all_away, half_away):
        before, after = logits_before_and_after_packing(module)
        assert torch.equal(before, expected[0])
        assert torch.equal(after, expected[1])
    assert {stream.is_resident for stream in streams_of(half_away)} == {False}, (
        "what stays has no hook any more"
    )


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_every_kind_of_layer_can_come_and_go(source_of: Sources, quantization: str) -> None:
    """Laying out changes a layer in its own way each; the next pass must find it as it was."""
    expected = logits_before_and_after_packing(loaded(source_of("untied"), quantization))
    module = loaded(source_of("untied", budgets(source_of("untied"), quantization)[0]), quantization)
    assert layers_away(module) == 5
    found = logits_before_and_after_packing(module)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_no_file_holds_is_in_the_offload_folder(source_of: Sources, tmp_path: Path) -> None:
    """A mixture's experts lie one by one in the checkpoint, and are wanted as one tensor."""
    source = source_of("mixtral", budgets(source_of("mixtral"), "none")[0])
    assert source.limits is not None
    limits = dataclasses.replace(source.limits, folder=tmp_path)
    module = loaded(dataclasses.replace(source, limits=limits), "none")
    (scratch,) = tmp_path.iterdir()
    assert any("experts" in file.name for file in scratch.iterdir())
    del module
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_half_precision_and_what_fits_as_a_whole(source_of: Sources) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        expected = logits_before_and_after_packing(loaded(source_of("tied", None, dtype), "none"), dtype)
        for budget in (budgets(source_of("tied", None, dtype), "none")[0], 2**24):
            found = logits_before_and_after_packing(loaded(source_of("tied", budget, dtype), "none"), dtype)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_nothing_stays_behind_between_two_passes(source_of: Sources) -> None:
    """Between passes all tensors of a streamed layer are on meta, also after one that failed half-way."""
    module = loaded(source_of("untied", budgets(source_of("untied"), "int8")[0]), "int8")
    _, expected = logits_before_and_after_packing(module)

    def tensors() -> set[str]:
        return {
            tensor.device.type
            for stream in streams_of(module)
            for tensor in stream.module.state_dict().values()
        }

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    assert tensors() == {"meta"}
    kept = [type(part) for part in module.modules()]
    failing = module.model.layers[2].input_layernorm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), torch.inference_mode():
        module(IDS)
    failing.remove()
    with torch.inference_mode():
        assert torch.equal(module(IDS).logits, expected)
    assert tensors() == {"meta"}
    assert [type(part) for part in module.modules()] == kept


def test_layers_that_wait_in_memory_and_on_disk(source_of: Sources, tmp_path: Path) -> None:
    """A GPU's CPU tier, with CPU memory as both: cpu:0 computes, cpu and disk are where layers wait."""
    source = source_of("tied")
    _, expected = logits_before_and_after_packing(loaded(source, "none"))
    module, weights = open_skeleton(source.model_class, source.folder, source.config, source.dtype, tmp_path)
    places = ["cpu:0", "cpu", "cpu", "disk", "disk"]
    device_map = {f"model.layers.{number}": place for number, place in enumerate(places)}
    device_map |= {"lm_head": "cpu", "model.embed_tokens": "cpu"}
    placement = Placement(device_map, None, 0, 0, 0, None, 0)
    dispatch(module, weights, torch.device("cpu", 0), placement)
    streams = streams_of(module)
    waiting = [stream for stream in streams if not stream.is_resident]
    assert [stream.following for stream in waiting] == [*waiting[1:], waiting[0]]
    assert len(streams) == 6
    assert len(waiting) == 5
    _, after = logits_before_and_after_packing(module)
    assert torch.equal(after, expected)


def test_a_streamed_output_layer_still_says_what_it_is(source_of: Sources) -> None:
    module = loaded(source_of("tied", budgets(source_of("tied"), "none")[0]), "none")
    head = module.get_output_embeddings()
    assert isinstance(head, StreamedLayer)
    assert head.weight.shape == (320, 64)
    assert isinstance(head.layer, nn.Linear)


def test_the_device_of_a_model_is_where_something_is(source_of: Sources) -> None:
    module = loaded(source_of("tied", budgets(source_of("tied"), "none")[0]), "none")
    assert next(module.parameters()).is_meta
    assert probe._device(module) == CPU
