"""What every adapter has in common: digests, sizes, dtypes, names, and that reading leaves other threads alone."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadenza.models.adapters import layout as layouts
from cadenza.models.adapters.adapter import LinearChange
from cadenza.models.adapters.keys import group_by_module
from cadenza.models.errors import ModelError

IDS = torch.tensor([[3, 7, 11, 5, 2, 40, 7, 1, 30, 12]])
WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["patterns", "dora", "saved", "embedding", "dora_embedding", "mica"])
def test_equals_peft_in_float32(
    kind: str,
    tiny: Callable[..., Any],
    make_adapter: Callable[..., Any],
    read: Callable[..., Any],
    apply: Callable[..., Any],
    tmp_path: Path,
) -> None:
    module = tiny("llama", torch.float32)
    mica = {"target_modules": ["q_proj"], "init_lora_weights": "mica"}
    folder, model = make_adapter(module, tmp_path, mica if kind == "mica" else kind)
    changed = apply(tiny("llama"), read(folder, module))  # the model in float64 has the same weights
    expected = model(input_ids=IDS).logits.double()
    torch.testing.assert_close(changed(input_ids=IDS).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "experts", "saved", "parameters"])
def test_half_precision_files_mean_the_same_numbers(
    dtype: torch.dtype,
    kind: str,
    tiny: Callable[..., Any],
    make_adapter: Callable[..., Any],
    read: Callable[..., Any],
    apply: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Tensors that nothing is computed with keep their type; products in float32 are as exact as that."""
    name = {"experts": "gpt_oss", "parameters": "gpt2"}.get(kind, "llama")
    arguments = (
        {"target_modules": [], "target_parameters": ["c_attn.weight", "wte.weight"]}
        if kind == "parameters"
        else kind
    )
    folder, _ = make_adapter(tiny(name), tmp_path, arguments)
    halves = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    half = read(folder, tiny(name))
    save_file({key: tensor.double() for key, tensor in halves.items()}, folder / WEIGHTS)
    whole = read(folder, tiny(name))
    assert half.digest != whole.digest
    first, second = apply(tiny(name), half).state_dict(), apply(tiny(name), whole).state_dict()
    for key, weight in second.items():
        torch.testing.assert_close(first[key], weight, atol=1e-6, rtol=1e-6)
    if kind == "lora":
        change = half.changes["model.layers.0.self_attn.q_proj"]
        assert isinstance(change, LinearChange)
        assert change.low_rank is not None
        assert change.low_rank.a.dtype == dtype
        assert change.low_rank.b.dtype == torch.float32


def test_a_digest_is_of_the_content(
    tiny: Callable[..., Any], make_adapter: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    module = tiny("llama")
    folder, _ = make_adapter(module, tmp_path / "first", "lora")
    copied = Path(shutil.copytree(folder, tmp_path / "second"))
    first = read(folder, module)
    assert read(copied, module).digest == first.digest
    assert read(folder, module, fingerprint="another").digest != first.digest
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    other = read(copied, module)
    tensors = load_file(copied / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, copied / WEIGHTS)
    assert len({first.digest, other.digest, read(copied, module).digest}) == 3


def test_sizes(
    tiny: Callable[..., Any], make_adapter: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_adapter(tiny("tied"), tmp_path, "tied_embeddings", scale=0.5)
    adapter = read(folder, tiny("tied"))
    assert adapter.rank == 4
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert adapter.num_bytes == stored - 48 * 16 * 8  # the tied layers share one table
    assert adapter.changes["lm_head"].weight is adapter.changes["model.embed_tokens"].weight
    assert adapter.base_model_name is None


def test_the_adapter_outlives_its_files(
    tiny: Callable[..., Any], make_adapter: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_adapter(tiny("llama"), tmp_path, "lora")
    adapter = read(folder, tiny("llama"))
    change = adapter.changes["model.layers.0.self_attn.q_proj"]
    before = change.low_rank.a.clone()
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert torch.equal(change.low_rank.a, before)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.q_proj", "base_model.model.model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "base_model.model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "base_model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "base_model.model.model.language_model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "base_model.model.language_model.model.layers.0.q_proj"),
        ("model.language_model.layers.0.q_proj", "base_model.model.model.layers.0.q_proj"),
        ("lm_head", "base_model.model.language_model.lm_head"),
        ("transformer.h.0.q_proj", "base_model.model.h.0.q_proj"),
        ("model.layers.0.mlp.gate", "base_model.model.model.layers.0.block_sparse_moe.gate"),
    ],
)
def test_names_past_the_modules_around_a_text_model(ours: str, theirs: str) -> None:
    layout = _layout(ours, "model.norm")
    groups = group_by_module({f"{theirs}.lora_A.weight": torch.zeros(1)}, layout)
    assert list(groups) == [ours]
    assert list(groups[ours].tensors) == ["lora_A.weight"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.q_proj"], "belongs to no module"),
        (
            ["language_model.x.q_proj", "model.x.q_proj"],
            "could belong to language_model.x.q_proj or to model.x.q_proj",
        ),
    ],
)
def test_names_of_other_parts_are_refused(names: list[str], message: str) -> None:
    """A vision tower's layers are called the same as the text model's."""
    key = "vision_tower.layers.0.q_proj" if len(names) == 1 else "x.q_proj"
    with pytest.raises(ModelError, match=message):
        group_by_module({f"base_model.model.{key}.lora_A.weight": torch.zeros(1)}, _layout(*names))


def _layout(*names: str) -> layouts.Layout:
    sites = {name: layouts.Site("linear", {"weight": (1, 1)}) for name in names}
    return layouts.Layout(sites, names[0], None, False, 1)


def test_quantized_experts_keep_their_order(
    tiny: Callable[..., Any], make_adapter: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    """Parameters that were put in place of others may come in another order; the wrappers' depth does not change."""
    folder, _ = make_adapter(tiny("mixtral"), tmp_path, "experts")
    layout = layouts.layout_of(tiny("mixtral"))
    name = "model.layers.0.mlp.experts"
    turned = replace(layout.sites[name], shapes=dict(reversed(layout.sites[name].shapes.items())))
    sites = dict(layout.sites) | {name: turned}
    expected = read(folder, tiny("mixtral"))
    actual = read(folder, tiny("mixtral"), layout=replace(layout, sites=sites))
    for parameter, pair in expected.changes[name].low_rank.items():
        assert torch.equal(actual.changes[name].low_rank[parameter].b, pair.b)


def test_reading_starts_no_threads(
    tiny: Callable[..., Any], make_adapter: Callable[..., Any], read: Callable[..., Any], tmp_path: Path
) -> None:
    """The loading thread must not bring a second team of workers with it."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs Linux")
    module, seen = tiny("tied"), []
    folder, _ = make_adapter(module, tmp_path, {"r": 32, "target_modules": "all-linear", "use_dora": True})

    def load() -> None:
        before = len(list(tasks.iterdir()))
        for _ in range(3):
            read(folder, module)
        seen.append(len(list(tasks.iterdir())) - before)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert seen == [0]
