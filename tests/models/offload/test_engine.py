"""The engine does not notice that layers come and go: whatever runs together, tokens are the resident model's."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.models import LoadConfig, LoadedModel, ModelError, load_model
from cadenza.models.offload.budget import StepNeeds
from cadenza.models.offload.stream import streams_of

PROMPTS = ["Once upon a time", "The capital of France is", "1, 2, 3,", "Once upon a time there"]
CONFIG = EngineConfig(max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_gb=0.005)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def folder(
    new_tiny_model: Callable[..., LoadedModel], smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model of six layers with the real vocabulary."""
    folder = tmp_path_factory.mktemp("six-layers")
    module = new_tiny_model(11, num_hidden_layers=6).module
    module.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smollm2.path / name).read_bytes())
    return folder


def least_memory(folder: Path) -> str:
    """What a refusal says would be enough, in bytes, and a little more, as it is rounded."""
    with pytest.raises(ModelError, match=r"does not fit into a max_memory of 1\.00 MiB") as refusal:
        Engine.load(str(folder), LoadConfig(device="cpu", max_memory="1MiB"), CONFIG)
    text = str(refusal.value).partition("at least ")[2]
    assert text.split()[1] == "MiB,"
    return f"{float(text.split()[0]) + 0.06}MiB"


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[Engine, Engine, Engine]]:
    """Resident; all layers away; the same with drafts from earlier text."""
    tight = LoadConfig(device="cpu", max_memory=least_memory(folder))
    with (
        Engine.load(str(folder), LoadConfig(device="cpu"), CONFIG) as resident,
        Engine.load(str(folder), tight, CONFIG) as streamed,
    ):
        drafting = dataclasses.replace(CONFIG, speculative="ngram", num_speculative_tokens=3)
        with Engine(load_model(str(folder), tight, CONFIG.step_needs), drafting) as speculating:
            yield resident, streamed, speculating


def test_all_layers_are_away(engines: tuple[Engine, Engine, Engine]) -> None:
    resident, streamed, _ = engines
    assert streams_of(resident.model.module) == []
    away = [stream for stream in streams_of(streamed.model.module) if not stream.is_resident]
    assert len(away) >= 6
    assert streamed.model.placement is not None
    assert streamed.model.kv_cache_bytes == int(0.005 * 1024**3)
    assert streamed.num_kv_tokens == resident.num_kv_tokens
    assert streamed.model.weight_bytes < resident.model.weight_bytes // 4


def answers(engine: Engine) -> list[Any]:
    """Greedy and sampled rows of several lengths together, with log-probabilities; then what is searched."""
    together = engine.generate_batch(PROMPTS, max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    sampled = engine.generate_batch(PROMPTS, max_tokens=5, temperature=0.8, seed=3, n=2, ignore_eos=True)
    constrained = engine.generate(PROMPTS[0], constraint=SCHEMA, max_tokens=20, temperature=0)
    beams = engine.generate(PROMPTS[1], strategy=BeamSearch(num_beams=3), n=3, max_tokens=4)
    long = [
        engine.generate(f"{'one two three ' * 30}{end}", max_tokens=4, temperature=0) for end in ("4", "5")
    ]
    assert engine.stats().prefix_cache_hits > 0
    alone = engine.generate(PROMPTS[3], max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    assert alone.choices[0].token_ids == together[3].choices[0].token_ids
    return [
        [(choice.token_ids, choice.logprobs, choice.text) for choice in completion.choices]
        for completion in (*together, *sampled, *long, constrained, beams)
    ]


def test_a_mixed_batch_gives_the_same_tokens_and_log_probabilities(
    engines: tuple[Engine, Engine, Engine],
) -> None:
    expected, *others = (answers(engine) for engine in engines)
    for found in others:
        assert found == expected


def test_the_cache_gets_what_the_budget_leaves(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, kv_cache_memory_gb=None)
    with Engine.load(str(folder), LoadConfig(device="cpu", max_memory="40MB"), config) as engine:
        placement = engine.model.placement
        assert placement is not None
        assert placement.kv_cache_bytes is not None
        taken = placement.resident_bytes + placement.working_bytes + placement.kv_cache_bytes
        assert taken <= 40_000_000
        per_token = 2 * 6 * 16 * 4
        assert engine.num_kv_tokens * per_token <= placement.kv_cache_bytes


def test_a_model_loaded_without_an_engine_leaves_room_for_its_defaults(folder: Path) -> None:
    with pytest.raises(ModelError, match=f"step of {StepNeeds().num_tokens} tokens"):
        load_model(str(folder), LoadConfig(device="cpu", max_memory="1MiB"))
