"""How the memory is divided: recounted here from the definition, and refused with the numbers."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.config import demand
from cadenza.decoding.kv_cache import LayerShape
from cadenza.decoding.memory_plan import GIB, Demand, plan_memory
from cadenza.models import LoadedModel, ModelError
from cadenza.models.memory import Memory

# 1 KiB per token in each of 8 layers: 8 KiB per token, 128 KiB per block of 16
PLAIN = Demand(
    device="cpu",
    is_gpu=False,
    block_size=16,
    max_num_seqs=4,
    context=1024,
    independent_context=None,
    bytes_per_token=8 * 1024,
    largest_layer=1024,
    step_bytes=0,
    free_bytes=100 * GIB,
)


def wanting(**changes: Any) -> Demand:
    return dataclasses.replace(PLAIN, **changes)


def test_no_more_than_can_be_used() -> None:
    plan = plan_memory(PLAIN)
    assert plan.num_blocks == 4 * (1024 // 16 + 1)
    assert plan.num_bytes == plan.num_blocks * 128 * 1024
    assert plan.reason == "4 sequences of 1024 tokens, all that can be used"
    assert (plan.max_model_len, plan.full_length_concurrency, plan.full_concurrency_length) == (1024, 4, 1024)


LARGE = {"max_num_seqs": 1000, "context": 100_000}


@pytest.mark.parametrize(
    ("changes", "budget", "reason"),
    [
        ({}, 4 * GIB, "4 GiB, the default's ceiling on a CPU"),
        ({"free_bytes": 5 * GIB}, 2 * GIB, "40% of the 5.00 GiB that are free"),
        ({"free_bytes": None}, 4 * GIB, "4 GiB, the default's ceiling on a CPU"),
        ({"is_gpu": True, "free_bytes": None}, 4 * GIB, "4 GiB, as the free memory is not known"),
        # one layer's share of the cache is copied by attention: an eighth, twice
        (
            {"is_gpu": True, "free_bytes": 10 * GIB},
            10 * GIB / 1.25,
            "what a step leaves of the 10.00 GiB",
        ),
        (
            {"is_gpu": True, "largest_layer": 1, "bytes_per_token": 8192, "free_bytes": 10 * GIB},
            9 * GIB,
            "90% of the 10.00 GiB that are free",
        ),
        ({"free_bytes": 5 * GIB, "step_bytes": 4 * GIB}, GIB / 1.25, "what a step leaves"),
        ({"allotted_bytes": GIB}, GIB, "what --max-memory leaves"),
        ({"allotted_bytes": 200 * GIB}, 80 * GIB, "what a step leaves of the 100.00 GiB"),
        ({"asked_bytes": 50 * GIB}, 50 * GIB, "--kv-cache-memory-gb"),
        ({"asked_bytes": 50 * GIB, "free_bytes": None}, 50 * GIB, "--kv-cache-memory-gb"),
        ({"asked_bytes": GIB, "allotted_bytes": 3 * GIB}, GIB, "--kv-cache-memory-gb"),
    ],
)
def test_the_smallest_limit_decides_and_is_named(changes: dict[str, Any], budget: float, reason: str) -> None:
    plan = plan_memory(wanting(**LARGE, **changes))
    assert plan.num_blocks == int(budget) // (128 * 1024)
    assert plan.reason.startswith(reason)


def test_a_budget_is_not_exceeded_on_request() -> None:
    with pytest.raises(
        ModelError, match=r"--kv-cache-memory-gb 3.00 is more than the 1.00 GiB that --max-memory"
    ):
        plan_memory(wanting(**LARGE, asked_bytes=3 * GIB, allotted_bytes=GIB))


def test_more_than_is_free_is_refused_with_the_numbers() -> None:
    short = wanting(free_bytes=GIB, step_bytes=GIB // 2)
    fits = int(GIB / 2 / 1.25)
    assert plan_memory(dataclasses.replace(short, asked_bytes=fits)).num_blocks > 0
    with pytest.raises(ModelError) as refusal:
        plan_memory(dataclasses.replace(short, asked_bytes=fits + 1))
    assert str(refusal.value) == (
        "--kv-cache-memory-gb 0.40 is more than cpu can give: 1.00 GiB are free, about 0.50 of them for a step,"
        " which leaves 0.40; 4 sequences of 1024 tokens could use 0.03 at most"
    )


def test_too_little_is_refused_with_the_numbers() -> None:
    least = 128 * 8 * 1024
    assert plan_memory(wanting(asked_bytes=least)).num_tokens == 128
    with pytest.raises(ModelError, match=r"hold 112 tokens; at least 128 are needed, 0\.001 GiB"):
        plan_memory(wanting(asked_bytes=least - 1))
    with pytest.raises(ModelError, match=r"0\.00 GiB of KV cache \(what a step leaves of the 1\.00"):
        plan_memory(wanting(free_bytes=GIB, step_bytes=2 * GIB))


def test_what_limits_a_sequence_is_named() -> None:
    by_cache = plan_memory(wanting(asked_bytes=200 * 8 * 1024))
    assert (by_cache.max_model_len, by_cache.context_reason) == (192, "the KV cache's size")
    assert (by_cache.full_length_concurrency, by_cache.full_concurrency_length) == (1, 48)
    by_rope = plan_memory(wanting(independent_context=500))
    assert by_rope.max_model_len == 500
    assert "rotary" in by_rope.context_reason
    assert plan_memory(PLAIN).context_reason == "the model's context"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_size_is_a_size(value: float) -> None:
    with pytest.raises(ModelError, match="kv_cache_memory_gb must be above 0"):
        EngineConfig(kv_cache_memory_gb=value)


def test_a_step_is_counted_by_its_tokens_and_rows(fresh_tiny_model: LoadedModel) -> None:
    def step_bytes(**fields: Any) -> int:
        config = EngineConfig(max_num_seqs=8, **fields)
        return demand(config, fresh_tiny_model, [LayerShape(1, 16, 16)], None, None).step_bytes

    small = step_bytes(max_num_batched_tokens=128)
    assert (
        step_bytes(max_num_batched_tokens=256) - small
        == small - 8 * 4 * (4 + 32) * fresh_tiny_model.config.vocab_size
    )
    assert step_bytes(max_num_batched_tokens=128, speculative="ngram") > small


def test_all_layers_count(fresh_tiny_model: LoadedModel) -> None:
    shapes = [LayerShape(1, 16, 16), LayerShape(2, 16, 8)]
    wanted = demand(EngineConfig(), fresh_tiny_model, shapes, None, None)
    assert (wanted.bytes_per_token, wanted.largest_layer) == (4 * (32 + 48), 4 * 48)


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 100 MiB left."""
    memory = Memory(100 * 1024**2, 24 * GIB, "a test")
    monkeypatch.setattr("cadenza.models.memory.memory_of", lambda device: memory)


@pytest.mark.usefixtures("cramped")
def test_an_engine_refuses_rather_than_dies(fresh_tiny_model: LoadedModel) -> None:
    # layers are replaced in place and twice is once too often: each engine gets weights of its own
    with pytest.raises(
        ModelError, match=r"--kv-cache-memory-gb 64\.00 is more than cpu can give: 0\.10 GiB are"
    ):
        Engine(copied(fresh_tiny_model), EngineConfig(kv_cache_memory_gb=64, max_num_seqs=8))
    with Engine(copied(fresh_tiny_model), EngineConfig(max_num_seqs=8, max_num_batched_tokens=128)) as engine:
        assert engine.memory.demand.free_bytes == 100 * 1024**2
        assert engine.num_kv_tokens == engine.memory.num_tokens == 8 * (256 // 16 + 1) * 16


def copied(model: LoadedModel) -> LoadedModel:
    return dataclasses.replace(model, module=copy.deepcopy(model.module))


def test_a_draft_models_cache_is_counted(fresh_tiny_model: LoadedModel) -> None:
    config = EngineConfig(max_num_seqs=4, speculative="its own copy")
    with Engine(copied(fresh_tiny_model), config, copied(fresh_tiny_model)) as engine:
        per_layer = 1 * (16 + 16) * torch.float32.itemsize
        assert engine.memory.demand.bytes_per_token == 2 * 2 * per_layer
