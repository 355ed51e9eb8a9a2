"""What a budget is shared out to: by hand, with sizes that the test computes itself."""

import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.models.errors import ModelError
from cadenza.models.offload.blocks import parts_of
from cadenza.models.offload.budget import Limits, StepNeeds
from cadenza.models.offload.placement import Placement, activation_bytes, kv_bytes_per_token, place
from cadenza.models.skeleton import empty_module

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LAYER = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)
TABLE = 4 * 1000 * 64  # of the embedding, and of the output layer
REST = 4 * 64
NEEDS = StepNeeds(kv_cache_bytes=5000, num_tokens=7, num_rows=3)
STEP = 4 * (7 * (8 * 64 + 4 * 128) + 4 * 3 * 1000)
FIXED = REST + STEP + 5000


def placed(device_bytes: int | None, device: torch.device = CPU, **changes: Any) -> Placement:
    module = empty_module(LlamaForCausalLM, CONFIG)
    for buffer in ("inv_freq", "original_inv_freq"):
        module.model.rotary_emb._buffers.pop(buffer, None)
    limits = Limits(
        device_bytes, changes.get("cpu"), changes.get("offload", 0), None, changes.get("needs", NEEDS)
    )
    return place(module, CONFIG, device, torch.float32, limits, "it")


def layers_at(placement: Placement, where: str) -> list[int]:
    names = [name for name, place in placement.device_map.items() if place == where and "layers." in name]
    return [int(name.rpartition(".")[2]) for name in names]


def test_the_parts_and_their_sizes() -> None:
    parts = parts_of(empty_module(LlamaForCausalLM, CONFIG))
    assert [part.num_bytes for part in parts.blocks] == [LAYER] * 10
    assert parts.head is not None
    assert parts.embedding is not None
    assert (parts.head.name, parts.head.num_bytes) == ("lm_head", TABLE)
    assert (parts.embedding.name, parts.embedding.num_bytes) == ("model.embed_tokens", TABLE)
    assert activation_bytes(CONFIG, torch.float32, NEEDS) == STEP
    assert kv_bytes_per_token(CONFIG, torch.float32) == 2 * 10 * 2 * 16 * 4


def test_layers_stay_as_far_as_the_budget_reaches() -> None:
    for number in range(8):
        found = placed(FIXED + TABLE + (number + 2) * LAYER)
        assert layers_at(found, "cpu") == list(range(number))
        assert layers_at(found, "disk") == list(range(number, 10))
        assert found.device_map["lm_head"] == "cpu"
        assert found.device_map["model.embed_tokens"] == "disk", "rows are looked up in the file"
        assert found.resident_bytes == REST + TABLE + number * LAYER
        assert found.disk_bytes == TABLE + (10 - number) * LAYER
        assert found.working_bytes == STEP + 2 * LAYER
        total = found.resident_bytes + found.working_bytes + (found.kv_cache_bytes or 0)
        assert total == found.limit_bytes


def test_a_layer_that_nearly_fits_does_not() -> None:
    assert layers_at(placed(FIXED + TABLE + 5 * LAYER - 1), "cpu") == [0, 1]


def test_with_room_for_all_nothing_waits() -> None:
    found = placed(FIXED + TABLE + 10 * LAYER)
    assert (len(layers_at(found, "cpu")), found.working_bytes) == (10, STEP)
    assert found.device_map["model.embed_tokens"] == "disk"
    assert set(placed(FIXED + 2 * TABLE + 10 * LAYER).device_map.values()) == {"cpu"}


def test_the_output_layer_waits_where_it_has_no_room() -> None:
    least = max(2 * LAYER, TABLE)
    found = placed(FIXED + least)
    assert set(found.device_map.values()) == {"disk"}
    assert found.working_bytes == STEP + least
    with pytest.raises(ModelError, match=r"it does not fit into .* bytes for weights that stay") as refusal:
        placed(FIXED + least - 1)
    given, needed = (float(number) for number in re.findall(r"([\d.]+) KiB", str(refusal.value))[:2])
    assert (given, needed) == (round((FIXED + least - 1) / 1024), round((FIXED + least) / 1024))


def test_the_cache_gets_a_share_that_leaves_room_for_a_layer() -> None:
    per_token = kv_bytes_per_token(CONFIG, torch.float32)
    needs = StepNeeds(num_tokens=7, num_rows=3, num_seqs=2, context_length=100, least_kv_tokens=4)
    ample = placed(10**8, needs=needs)
    assert ample.kv_cache_bytes == 2 * (100 + 64) * per_token, "no more than can be used"
    budget = REST + STEP + TABLE + 2 * LAYER + 2000 * per_token
    long = StepNeeds(num_tokens=7, num_rows=3, context_length=10**6, least_kv_tokens=4)
    assert placed(budget, needs=long).kv_cache_bytes == budget // 4
    tight = REST + STEP + max(TABLE, 2 * LAYER) + 5 * per_token
    assert placed(tight, needs=long).kv_cache_bytes == 5 * per_token
    with pytest.raises(ModelError, match="KV cache"):
        placed(tight - 2 * per_token, needs=long)


def test_a_gpu_has_cpu_memory_before_the_disk() -> None:
    found = placed(FIXED + TABLE + 4 * LAYER, GPU, cpu=3 * LAYER)
    assert layers_at(found, "cuda:0") == [0, 1]
    assert layers_at(found, "cpu") == [2, 3, 4]
    assert layers_at(found, "disk") == [5, 6, 7, 8, 9]
    assert found.cpu_bytes == 3 * LAYER + TABLE


def test_weights_that_are_to_stay_in_cpu_memory() -> None:
    found = placed(None, GPU, offload=3 * LAYER, cpu=2**30)
    assert layers_at(found, "cuda:0") == list(range(7))
    assert layers_at(found, "cpu") == [7, 8, 9]
    assert found.device_map["lm_head"] == found.device_map["model.embed_tokens"] == "cuda:0"
    assert found.kv_cache_bytes is None
    assert layers_at(placed(None, GPU, offload=100 * LAYER, cpu=2**30), "cpu") == list(range(10))
