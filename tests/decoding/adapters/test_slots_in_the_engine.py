"""More adapters than the device has slots: who waits, who passes whom, and that nobody's tokens depend on it."""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, SamplingParams
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.adapters.slots import AdapterSlots
from cadenza.decoding.block_pool import BlockPool, prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.scheduler import _MAX_OVERTAKEN, Scheduler
from cadenza.decoding.strategies.spec import BeamSearch, StrategySpec
from cadenza.decoding.stream import RequestStream
from cadenza.decoding.voting.answer import FullText
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.models import LoadedModel
from cadenza.models.adapters.adapter import Adapter

# the scheduler alone


class _Silent:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""


class Batch:
    """A scheduler whose branches end after a number of tokens, and what lies in its slots."""

    def __init__(self, num_slots: int, max_num_seqs: int = 8, num_blocks: int = 400) -> None:
        self.content: dict[int, str] = {}
        self.slots = AdapterSlots(num_slots, self._put, self._clear)
        self.scheduler = Scheduler(BlockPool(num_blocks, 16), max_num_seqs, 512, True, self.slots)
        self.names: dict[Branch, str] = {}
        self.lengths: dict[Branch, int] = {}
        self.ended: list[str] = []

    def _put(self, slot: int, adapter: Adapter) -> None:
        assert slot not in self.content
        self.content[slot] = adapter.digest

    def _clear(self, slot: int) -> None:
        del self.content[slot]

    def add(self, name: str, adapters: str = "", length: int = 3, priority: int = 0) -> Branch:
        """adapters: a letter for each."""
        branch = Branch(
            order=(priority, len(self.names), 0),
            index=0,
            num_prompt_tokens=4,
            token_ids=[len(self.names)] * 4,
            text=TextStream(IncrementalDetokenizer(_Silent(), (), True), StopStringFilter((), False)),
            cache_root=prefix_root(),
            adapters=AdapterSet.of(*(Adapter(each, {}, 1, 1) for each in adapters)) if adapters else None,
        )
        self.names[branch], self.lengths[branch] = name, length
        self.scheduler.add(branch)
        return branch

    @property
    def running(self) -> list[str]:
        return [self.names[branch] for branch in self.scheduler.running]

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step.spans
        held = {digest for branch in self.scheduler.running for digest in _digests(branch)}
        assert held <= set(self.content.values()), "whoever runs has all its adapters on the device"
        self.scheduler.complete(step)
        for span in step.spans:
            branch = span.branch
            if span.reaches_end and branch in self.scheduler.running:
                branch.token_ids.append(0)
                if branch.num_generated == self.lengths[branch]:
                    self.scheduler.remove(branch)
                    self.ended.append(self.names[branch])

    def run(self) -> list[str]:
        """To the end of all; returns the names in the order of their ends."""
        while self.scheduler.has_work:
            self.step()
        return self.ended


def _digests(branch: Branch) -> list[str]:
    return [] if branch.adapters is None else [term.adapter.digest for term in branch.adapters.terms]


def test_all_come_to_their_turn() -> None:
    batch = Batch(num_slots=2)
    for letter in "abcdefg":
        batch.add(letter, letter)
    assert batch.run() == list("abcdefg")


def test_those_whose_adapters_are_there_pass_but_not_for_ever() -> None:
    """One adapter is asked for again and again: whoever waits for another is passed by so many, and no more."""
    batch = Batch(num_slots=1)
    batch.add("first", "a")
    batch.step()
    waiting = batch.add("waiting", "b")
    number = 0
    while batch.names[waiting] not in batch.running:
        for _ in range(2):
            batch.add(f"passing-{number}", "a")
            number += 1
        batch.step()
        assert number < 20 * _MAX_OVERTAKEN
    num_passed = sum(name.startswith("passing") for name in batch.ended)
    assert num_passed == waiting.num_overtaken == _MAX_OVERTAKEN
    batch.run()
    assert len(batch.ended) == number + 2


def test_requests_without_adapters_are_not_held_up() -> None:
    batch = Batch(num_slots=1)
    batch.add("long", "a", length=30)
    waiting = batch.add("waiting", "b")
    for number in range(3 * _MAX_OVERTAKEN):
        batch.add(f"plain-{number}", length=1)
    while sum(name.startswith("plain") for name in batch.ended) < 3 * _MAX_OVERTAKEN:
        batch.step()
    assert "long" not in batch.ended, "they went while the slot was taken"
    assert waiting.num_overtaken == 0, "and took nothing from who waits"
    assert batch.run()[-2:] == ["long", "waiting"]


def test_a_set_gets_all_its_slots_or_none() -> None:
    batch = Batch(num_slots=3)
    batch.add("a", "a", length=6)
    batch.add("b", "b", length=3)
    batch.add("set", "cd", length=2)
    batch.step()
    assert batch.running == ["a", "b"]
    assert sorted(batch.content.values()) == ["a", "b"], "the third slot does not wait half taken"
    batch.add("late", "e")  # there is a slot for it, but one that the set waits for
    while "b" not in batch.ended:
        assert batch.running == ["a", "b"]
        batch.step()
    batch.step()
    assert batch.running == ["a", "set"]
    assert sorted(batch.content.values()) == ["a", "c", "d"]
    assert batch.run() == ["b", "set", "a", "late"]


def test_priority_comes_before_arrival() -> None:
    batch = Batch(num_slots=1)
    batch.add("running", "a")
    batch.step()
    batch.add("early", "b", priority=1)
    batch.add("urgent", "c", priority=0)
    assert batch.run() == ["running", "urgent", "early"]


def test_idle_adapters_stay_until_their_slots_are_needed() -> None:
    batch = Batch(num_slots=2)
    for letter in "ab":
        batch.add(letter, letter)
    batch.run()
    assert sorted(batch.content.values()) == ["a", "b"]
    batch.add("a again", "a")
    batch.run()
    batch.add("c", "c")
    batch.run()
    assert sorted(batch.content.values()) == ["a", "c"], "the least recently used one went"
    for digest in "ac":
        batch.slots.forget(digest)
    assert not batch.content


def test_an_adapter_in_use_is_not_forgotten() -> None:
    batch = Batch(num_slots=1)
    batch.add("a", "a")
    batch.step()
    batch.slots.forget("a")
    assert list(batch.content.values()) == ["a"]


def test_what_cannot_be_brought_to_the_device_fails_alone() -> None:
    """The slot that it was to get is cleared of what had been brought there."""
    touched: list[str] = []

    def put(slot: int, adapter: Adapter) -> None:
        touched.append(f"put {adapter.digest}")
        if adapter.digest == "b":
            raise MemoryError("no room for b")

    slots = AdapterSlots(2, put, lambda slot: touched.append(f"clear {slot}"))
    adapters = AdapterSet.of(*(Adapter(each, {}, 1, 1) for each in "ab"))
    with pytest.raises(MemoryError):
        slots.enter(adapters)
    assert touched == ["put a", "put b", "clear 1"]
    assert slots.enter(AdapterSet.of(Adapter("c", {}, 1, 1)))
    assert slots.enter(AdapterSet.of(Adapter("d", {}, 1, 1))), "a, which nobody uses, made room"


@pytest.mark.parametrize("seed", range(20))
def test_any_requests_come_to_their_end(seed: int) -> None:
    """Sets of up to three of six adapters, three slots, blocks for few: preempted, passed by, and done in the end."""
    rng = random.Random(seed)
    batch = Batch(num_slots=3, max_num_seqs=4, num_blocks=8)
    for number in range(30):
        adapters = "".join(rng.sample("abcdef", rng.choice((0, 1, 1, 1, 2, 3))))
        batch.add(str(number), adapters, length=rng.randrange(1, 60), priority=rng.choice((0, 0, 1)))
        for _ in range(rng.randrange(4)):
            if batch.scheduler.has_work:
                batch.step()
    assert sorted(batch.run(), key=int) == [str(number) for number in range(30)]
    assert not +batch.slots._users
    assert batch.scheduler.num_preemptions > 0


# the engine

NUM_REQUESTS = 16
NAMES = "abcde"
SETS: Sequence[dict[str, float]] = (
    {}, {"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"d": 1.0}, {"e": 1.0}, {"a": 0.5, "c": -0.5}, {"d": 1.0, "b": 0.25}
)  # fmt: skip
WAYS: Sequence[tuple[dict[str, Any], StrategySpec | None]] = (
    ({"temperature": 0.0, "allowed_token_ids": (300, 301, 302)}, None),  # who guesses is right at times
    ({"temperature": 1.0, "n": 4}, None),
    ({"temperature": 0.0, "n": 2}, BeamSearch(num_beams=3)),
    ({"temperature": 1.0}, SelfConsistency(n=4, answer=FullText(), stop_when_decided=False)),
)


@pytest.fixture(scope="module")
def folders(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters in peft's format of ranks 3 to 19, which takes a second plane; one of them of few layers."""
    root, config = tmp_path_factory.mktemp("adapters"), tiny_model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden // 2),
        "mlp.down_proj": (inner, hidden),
    }
    for number, name in enumerate(NAMES):
        rank, tensors = 3 + 4 * number, {}
        own = dict(list(shapes.items())[number % 3 :])
        noise = torch.Generator().manual_seed(number)
        for layer in range(config.num_hidden_layers):
            for at, (width, height) in own.items():
                key = f"base_model.model.model.layers.{layer}.{at}.lora"
                tensors[f"{key}_A.weight"] = torch.randn(rank, width, generator=noise) * 0.4
                tensors[f"{key}_B.weight"] = torch.randn(height, rank, generator=noise) * 0.4
        targets = sorted(at.rpartition(".")[2] for at in own)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": targets}))
        save_file(tensors, root / name / "adapter_model.safetensors")
    return root


def _own_model(tiny_model: LoadedModel) -> LoadedModel:
    """Always the same weights, in layers that no engine has replaced yet."""
    torch.manual_seed(23)
    module = LlamaForCausalLM(tiny_model.config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dataclasses.replace(tiny_model, module=module)


SPECULATIVE = {"no drafts": None, "ngram": "ngram", "a draft model": "itself"}


@pytest.fixture(scope="module", params=SPECULATIVE)
def crowded(tiny_model: LoadedModel, folders: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Two slots for five adapters, few seats, few blocks."""
    speculative = SPECULATIVE[request.param]
    config = EngineConfig(
        enable_lora=True,
        max_loras=2,
        max_lora_rank=32,
        max_cpu_loras=5,
        max_num_seqs=7,
        max_num_batched_tokens=80,
        kv_cache_memory_gb=0.0002 if speculative != "itself" else 0.0004,
        speculative=speculative,
    )
    draft = _own_model(tiny_model) if speculative == "itself" else None
    with Engine(_own_model(tiny_model), config, draft=draft) as engine:
        if draft is not None:
            engine._core._speculator._drafter._pass_cost = 0.0  # type: ignore[union-attr]  # as if it were small
        assert engine.adapters is not None
        for name in NAMES:
            engine.adapters.load(name, str(folders / name)).result()
        yield engine


def _ask(engine: Engine, number: int) -> tuple[RequestStream, int]:
    rng = random.Random(number)
    fields, strategy = WAYS[(number + number // len(SETS)) % len(WAYS)]
    prompt = [rng.randrange(300, 20_000) for _ in range(20)] * 4
    sampling = SamplingParams(max_tokens=12, seed=number, logprobs=2, ignore_eos=True, **fields)
    assert engine.adapters is not None
    adapters = engine.adapters.acquire(list(SETS[number % len(SETS)].items())).result()
    try:
        request = GenerationRequest(
            request_id=str(number),
            prompt_token_ids=tuple(prompt[: rng.randrange(1, 80)]),
            sampling=sampling,
            strategy=strategy,
            adapters=adapters,
            priority=rng.choice((0, 0, 1)),
        )
        return engine.submit(request), sampling.n
    finally:
        adapters.release()


def _gist(completion: Completion) -> list[Any]:
    return [
        (choice.text, choice.token_ids, choice.logprobs, choice.finish_reason, choice.score)
        for choice in completion.choices
    ] + [completion.vote]


def test_every_way_of_decoding_says_the_same_alone_and_in_a_crowd(crowded: Engine) -> None:
    """All ways with all sets at once: more adapters than slots, more branches than seats, more tokens than blocks."""
    numbers = range(NUM_REQUESTS)
    alone = [_gist(collect(*_ask(crowded, number))) for number in numbers]
    crowded.reset_prefix_cache()
    before = crowded.stats().num_preemptions
    streams = [_ask(crowded, number) for number in numbers]
    for number, (stream, n) in enumerate(streams):
        assert _gist(collect(stream, n)) == alone[number], number
    stats = crowded.stats()
    assert stats.num_preemptions > before
    if crowded.config.speculative:
        assert stats.spec_decode_num_accepted_tokens > 0
    tokens = {tuple(entry[1]) for gist in alone for entry in gist[:-1]}
    assert len(tokens) > NUM_REQUESTS
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
