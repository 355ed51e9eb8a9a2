"""What an adapter took is given back: host memory, slots, and the process's memory as the system counts it."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.adapters.errors import AdapterRefused
from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.slots import AdapterSlots
from cadenza.decoding.completion import collect
from cadenza.decoding.request import GenerationRequest, SamplingParams
from cadenza.models import LoadedModel
from cadenza.models.adapters.adapter import Adapter

NUM_CONTENTS, RANK = 6, 16


@pytest.fixture
def folders(fresh_tiny_model: LoadedModel, tmp_path: Path) -> list[str]:
    """Adapters of three megabytes in peft's format, nearly all of it in the output layer."""
    config = fresh_tiny_model.config
    shapes = {
        "model.layers.0.self_attn.q_proj": (config.hidden_size, config.hidden_size),
        "lm_head": (config.hidden_size, config.vocab_size),
    }
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    for number in range(NUM_CONTENTS):
        noise, tensors = torch.Generator().manual_seed(number), {}
        for name, (width, height) in shapes.items():
            key = f"base_model.model.{name}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(RANK, width, generator=noise) * 0.2
            tensors[f"{key}_B.weight"] = torch.randn(height, RANK, generator=noise) * 0.2
        folder = tmp_path / str(number)
        folder.mkdir()
        text = json.dumps({**settings, "target_modules": ["q_proj", "lm_head"]})
        (folder / "adapter_config.json").write_text(text)
        save_file(tensors, folder / "adapter_model.safetensors")
    return [str(tmp_path / str(number)) for number in range(NUM_CONTENTS)]


@pytest.fixture
def engine(fresh_tiny_model: LoadedModel) -> Iterator[Engine]:
    config = EngineConfig(kv_cache_memory_gb=0.005, enable_lora=True, max_loras=2, max_cpu_loras=3)
    with Engine(fresh_tiny_model, config) as running:
        yield running


@pytest.fixture
def library(engine: Engine) -> AdapterLibrary:
    assert engine.adapters is not None
    return engine.adapters


@pytest.fixture
def slots(engine: Engine) -> AdapterSlots:
    found = engine._core.scheduler._adapters
    assert found is not None
    return found


@pytest.fixture
def in_slots(engine: Engine, slots: AdapterSlots) -> Callable[[], set[str]]:
    """The digests of what lies on the device, when all that was asked of the engine's thread is done."""

    def read() -> set[str]:
        engine._call(lambda: None).result()  # by now requests that have ended are forgotten, too
        return engine._call(lambda: set(slots._slots)).result()

    return read


def _ask(engine: Engine, *names: str) -> None:
    engine.generate((5, 6, 7), adapter=dict.fromkeys(names, 1.0), max_tokens=2, temperature=0)


def num_alive() -> int:
    gc.collect()
    return sum(type(thing) is Adapter for thing in gc.get_objects())


def test_what_is_unloaded_leaves_the_device(
    engine: Engine, library: AdapterLibrary, folders: list[str], in_slots: Callable[[], set[str]]
) -> None:
    first, second = (library.load(name, folders[at]).result().digest for at, name in enumerate("ab"))
    assert in_slots() == {first, second}, "each was brought there before its name was published"
    library.unload("a")
    assert in_slots() == {second}
    library.load("same", folders[1]).result()
    library.unload("b")
    assert in_slots() == {second}, "another name stands for it"
    library.unload("same")
    assert in_slots() == set()


def test_what_is_replaced_goes_when_nobody_can_ask_for_it(
    library: AdapterLibrary, folders: list[str], in_slots: Callable[[], set[str]]
) -> None:
    digests = [library.load("a", path, in_place=True).result().digest for path in folders[:3]]
    assert in_slots() == set(digests[1:]), "one can be rolled back to, the first cannot"
    library.unload("a")
    assert in_slots() == set()


def test_what_a_request_uses_stays_until_it_ends(
    engine: Engine, library: AdapterLibrary, folders: list[str], in_slots: Callable[[], set[str]]
) -> None:
    num_before = num_alive()
    digest = library.load("a", folders[0]).result().digest
    adapters = library.acquire([("a", 1.0)]).result()
    library.unload("a")
    assert in_slots() == {digest}
    assert num_alive() == num_before + 1
    adapters.release()
    assert in_slots() == set()
    del adapters
    assert num_alive() == num_before


def test_what_memory_let_go_leaves_the_device_with_its_name(
    engine: Engine, library: AdapterLibrary, folders: list[str], in_slots: Callable[[], set[str]]
) -> None:
    """Host memory and slots go by the last use each for itself: an adapter may be on the device alone."""
    digest = library.load("a", folders[0]).result().digest
    adapters = library.acquire([("a", 1.0)]).result()
    for number in range(1, 4):
        library.load(f"other-{number}", folders[number]).result()
    sampling = SamplingParams(max_tokens=2, temperature=0)
    request = GenerationRequest(
        request_id="late", prompt_token_ids=(5, 6, 7), sampling=sampling, adapters=adapters
    )
    collect(engine.submit(request), 1)  # it was asked for first and computed last
    adapters.release()
    library.load("other-4", folders[4]).result()
    assert digest in in_slots()
    assert not next(info for info in library.list() if info.name == "a").is_in_memory
    library.unload("a")
    assert digest not in in_slots()


def test_a_load_that_is_refused_at_the_last_moment_leaves_nothing(
    engine: Engine,
    library: AdapterLibrary,
    slots: AdapterSlots,
    folders: list[str],
    in_slots: Callable[[], set[str]],
) -> None:
    """Read and brought to the device, but with it too many would be pinned."""
    for number in range(2):
        library.load(f"pinned-{number}", folders[number], pin=True).result()
    library.load("other", folders[2]).result()
    engine._call(lambda: slots.forget(next(iter(slots._slots)))).result()
    before, num_before = in_slots(), num_alive()
    assert len(before) == 1
    with pytest.raises(AdapterRefused, match="does not fit"):
        library.load("pinned-2", folders[3], pin=True).result()
    assert in_slots() == before
    assert num_alive() == num_before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_hundred_changes_leave_the_process_as_large_as_it_was(
    engine: Engine, library: AdapterLibrary, folders: list[str], in_slots: Callable[[], set[str]]
) -> None:
    """Each adapter answers once; always the same shapes, so that torch's own caches are full before it is counted."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def change_twenty_times() -> None:
        for number in range(5):
            library.load("a", folders[number], in_place=True).result()
            library.load("b", folders[number + 1]).result()
            _ask(engine, "a", "b")
            library.load("b", folders[(number + 2) % NUM_CONTENTS], in_place=True).result()
            _ask(engine, "b")
            library.roll_back("b").result()
            _ask(engine, "a")
            library.unload("b")
        library.unload("a")
        assert in_slots() == set()

    num_before = num_alive()
    for _ in range(3):
        change_twenty_times()
    before = resident_bytes()
    for _ in range(10):
        change_twenty_times()
    grown = resident_bytes() - before
    assert num_alive() == num_before
    num_read = 10 * 5 * 3
    num_bytes = num_read * (Path(folders[0]) / "adapter_model.safetensors").stat().st_size
    assert grown < num_bytes / 20, f"by {grown} bytes, where {num_bytes} were read"
