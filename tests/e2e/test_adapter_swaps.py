"""Adapters are changed two hundred times while thirty-two clients stream: no request fails, every answer is that of one
set of contents that were published while it ran, and the memory of what was unloaded comes back.

What each must say is asked for afterwards, one request at a time, of a server that holds nothing else.
"""

import asyncio
import dataclasses
import gc
import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from cadenza.decoding import Engine, EngineConfig
from cadenza.models import LoadedModel
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.locate import AdapterSources
from cadenza.server.service import ServerSettings, Service

ADMIN = {"authorization": "Bearer admin"}
MAX_LORAS, MAX_CPU_LORAS = 4, 6
NUM_STREAMS, NUM_CHANGES, NUM_CONTENTS = 32, 200, 8
STEADY = ("red", "green", "blue", "pinned")
"""Names that are never without a content; the last one's is replaced by overwriting its files."""
GUESTS = ("guest-0", "guest-1", "guest-2")
"""Names that come and go: whoever asks for one may be told that it is not there."""
PROMPTS = ("Once upon a time there was a small adapter. " * 8, "A short one")
"""The first is longer than a tile, so that its beginning comes from the prefix cache where that has it."""
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "max_tokens": 6},
    {"temperature": 0.8, "seed": 7, "n": 2, "max_tokens": 4},
    {"temperature": 0, "max_tokens": 6, "guided_regex": "[a-z ]{4,30}"},
)
WEIGHTED = ({"red": 0.5, "green": 0.75}, {"pinned": -0.5, "green": 1.0}, {"blue": 1.0, "guest-0": 0.5})
"""Sets of names, with their scales."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What one client asks, apart from whether it wants a stream."""

    prompt: int
    kind: int
    terms: tuple[tuple[str, float], ...]
    """Names of adapters and their scales."""

    @property
    def body(self) -> dict[str, Any]:
        lora = [{"id": name, "scale": scale} for name, scale in self.terms]
        fields = {"prompt": PROMPTS[self.prompt], "return_token_ids": True}
        return {**fields, **KINDS[self.kind], "lora": lora}


@dataclasses.dataclass(frozen=True)
class Said:
    """One answer: which contents it was computed with, by the server's own word, and its tokens."""

    fingerprint: str
    token_ids: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    question: Question
    said: Said | None
    """None: 404."""
    start: float
    end: float


@dataclasses.dataclass
class Name:
    """What a name stands for, as those know who change it one after the other."""

    generation: int = 0
    content: int | None = None
    previous: int | None = None
    history: list[tuple[float, float, int | None]] = dataclasses.field(
        default_factory=lambda: [(0.0, 0.0, None)]
    )
    """(when a change was asked for, when it was answered, the content)."""

    def during(self, start: float, end: float) -> list[int | None]:
        """What it may have stood for at some time of this span."""
        until = [answered for _, answered, _ in self.history[1:]] + [float("inf")]
        found = {
            content
            for (since, _, content), before in zip(self.history, until, strict=True)
            if since <= end and before >= start
        }
        return sorted(found, key=str)


def write_adapter(folder: Path, number: int, config: LlamaConfig) -> None:
    """A megabyte in peft's format, most of it in the output layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (hidden, hidden // 2),
            "mlp.down_proj": (inner, hidden),
        }.items()
    } | {"lm_head": (hidden, config.vocab_size)}
    generator = torch.Generator().manual_seed(number)
    rank, tensors = 5, {}
    for name, (width, height) in layers.items():
        key = f"base_model.model.{name}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
        tensors[f"{key}_B.weight"] = torch.randn(height, rank, generator=generator) * 0.3
    targets = sorted({name.rpartition(".")[2] for name in layers})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 10}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": targets}))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def small(new_tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return dataclasses.replace(new_tiny_model(4), name="small")


@pytest.fixture(scope="module")
def root(small: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swapped")
    for number in range(NUM_CONTENTS):
        write_adapter(folder / f"content-{number}", number, small.config)
    shutil.copytree(folder / "content-0", folder / "live")
    return folder


@pytest.fixture(scope="module")
def engine(small: LoadedModel) -> Iterator[Engine]:
    config = EngineConfig(
        kv_cache_memory_gb=0.01, enable_lora=True, max_loras=MAX_LORAS, max_cpu_loras=MAX_CPU_LORAS
    )
    with Engine(small, config) as running:
        yield running


@pytest.fixture(scope="module")
def url(engine: Engine, root: Path, serving: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    settings = ServerSettings(admin_api_keys=("admin",), adapter_sources=AdapterSources((root,)))
    with serving(Service(loaded=engine, settings=settings)) as url:
        yield url


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], *, stream: bool) -> Said | None:
    """None: a 404, which must say why. Anything else but an answer fails."""
    response = await client.post("/v1/completions", json={**body, "stream": stream})
    if response.status_code == 404:
        assert response.json()["error"]["code"] == "model_not_found", response.text
        return None
    assert response.status_code == 200, response.text
    frames = [response.text]
    if stream:
        frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert frames.pop() == "[DONE]"
    tokens: list[list[int]] = [[] for _ in range(body.get("n", 1))]
    endings = []
    parts = [json.loads(frame) for frame in frames]
    for part in parts:
        assert "error" not in part, part
        for choice in part["choices"]:
            tokens[choice["index"]] += choice.get("token_ids") or []
            endings += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(endings) == list(range(len(tokens)))
    (fingerprint,) = {part["system_fingerprint"] for part in parts}
    return Said(fingerprint, tuple(tuple(own) for own in tokens))


class Clients:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self.answers: list[Answer] = []
        self.is_over = False
        self.has_answered = asyncio.Event()
        self._client = client

    async def run(self, number: int) -> None:
        rng = random.Random(number)
        while not self.is_over:
            question = self._question(rng)
            start = time.perf_counter()
            said = await ask(self._client, question.body, stream=rng.random() < 0.75)
            self.answers.append(Answer(question, said, start, time.perf_counter()))
            self.has_answered.set()

    def _question(self, rng: random.Random) -> Question:
        prompt, choice = rng.randrange(len(PROMPTS)), rng.random()
        if choice < 0.1:
            return Question(prompt, 0, ())
        if choice < 0.2:
            return Question(0, 0, tuple(rng.choice(WEIGHTED).items()))
        name = rng.choice(GUESTS if choice < 0.45 else STEADY)
        return Question(prompt, rng.choice((0, 0, 1, 2)), ((name, 1.0),))


class Operator:
    """Changes what some names stand for, one change at a time, and knows what each must be answered."""

    def __init__(
        self, client: httpx.AsyncClient, root: Path, names: dict[str, Name], num_done: Counter[str]
    ) -> None:
        self.names = names
        self._num_done = num_done
        self._client, self._root, self._rng = client, root, random.Random("".join(names))

    async def begin(self) -> None:
        for name in self._steady:
            await self._load(name)

    async def run(self, has_answered: asyncio.Event) -> None:
        operations = (self._replace, self._replace, self._guest, self._guest, self._roll_back, self._refused)
        while self._num_done.total() < NUM_CHANGES:
            has_answered.clear()
            await self._rng.choice(operations)()
            await has_answered.wait()

    async def end(self) -> None:
        for name, known in self.names.items():
            if known.content is not None:
                await self._unload(name)

    @property
    def _steady(self) -> list[str]:
        return [name for name in self.names if name in STEADY]

    async def _replace(self) -> None:
        present = [name for name, known in self.names.items() if known.content is not None]
        await self._load(self._rng.choice(present))

    async def _guest(self) -> None:
        name = self._rng.choice([name for name in self.names if name in GUESTS])
        await (self._load if self.names[name].content is None else self._unload)(name)

    async def _roll_back(self) -> None:
        able = [name for name, known in self.names.items() if known.previous is not None and name != "pinned"]
        if not able:
            return await self._replace()
        name = self._rng.choice(able)
        await self._change("rollback", name, self.names[name].previous)

    async def _load(self, name: str) -> None:
        known = self.names[name]
        content = self._rng.choice([each for each in range(NUM_CONTENTS) if each != known.content])
        fields: dict[str, Any] = {
            "lora_path": f"content-{content}",
            "load_inplace": known.content is not None,
        }
        if name == "pinned":  # its old content is in memory whatever becomes of the files
            source = self._root / f"content-{content}" / "adapter_model.safetensors"
            os.replace(shutil.copy(source, self._root / "copy"), self._root / "live" / source.name)
            fields |= {"lora_path": "live", "pinned": True}
        await self._change("load", name, content, **fields)

    async def _unload(self, name: str) -> None:
        await self._change("unload", name, None)

    async def _change(self, verb: str, name: str, content: int | None, **fields: Any) -> None:
        known = self.names[name]
        if self._rng.random() < 0.5:
            fields["expected_generation"] = 0 if known.content is None else known.generation
        asked = time.perf_counter()
        response = await self._post(verb, name, **fields)
        assert response.status_code == 200, response.text
        known.history.append((asked, time.perf_counter(), content))
        known.previous = known.content if content is not None else None
        known.generation += content is not None
        known.content = content
        assert int(response.headers["x-lora-generation"]) == known.generation
        self._num_done[verb] += 1

    async def _refused(self) -> None:
        """Nothing changes."""
        name = self._rng.choice(self._steady)
        known, path = self.names[name], {"lora_path": f"content-{self._rng.randrange(NUM_CONTENTS)}"}
        wrong = {"expected_generation": known.generation + self._rng.choice((-1, 1))}
        for verb, fields, status, code in (
            ("load", {**path, **wrong, "load_inplace": True}, 409, "generation_mismatch"),
            ("rollback", wrong, 409, "generation_mismatch"),
            ("unload", wrong, 409, "generation_mismatch"),
            ("load", path, 400, "adapter_exists"),
            ("load", {"lora_path": "../elsewhere", "load_inplace": True}, 403, "path_not_allowed"),
        ):
            response = await self._post(verb, name, **fields)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
        self._num_done["refused"] += 1

    async def _post(self, verb: str, name: str, **fields: Any) -> httpx.Response:
        body = {"lora_name": name, **fields}
        return await self._client.post(f"/v1/{verb}_lora_adapter", json=body, headers=ADMIN)


async def storm(url: str, root: Path, names: dict[str, Name]) -> list[Answer]:
    """From no adapters to no adapters."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        clients, num_done = Clients(client), Counter[str]()
        parts = ({name: names[name] for name in list(names)[part::2]} for part in range(2))
        operators = [Operator(client, root, own, num_done) for own in parts]
        await asyncio.gather(*(operator.begin() for operator in operators))
        async with asyncio.TaskGroup() as group:  # whoever fails ends the others
            for number in range(NUM_STREAMS):
                group.create_task(clients.run(number))
            await asyncio.gather(*(operator.run(clients.has_answered) for operator in operators))
            clients.is_over = True
        for operator in operators:
            await operator.end()
    assert min(num_done[verb] for verb in ("load", "unload", "rollback", "refused")) > 10, num_done
    return clients.answers


class Truth:
    """What contents say, asked for one at a time."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._known: dict[Question, Said] = {}

    async def change(self, verb: str) -> None:
        for number in range(NUM_CONTENTS):
            body = {"lora_name": f"content-{number}"} | (
                {"lora_path": f"content-{number}"} if verb == "load" else {}
            )
            response = await self._client.post(f"/v1/{verb}_lora_adapter", json=body, headers=ADMIN)
            assert response.status_code == 200, response.text

    async def of(self, question: Question, contents: tuple[int, ...]) -> Said:
        """contents: of the question's names. Those of equal content add up."""
        scales = Counter[str]()
        for (_, scale), content in zip(question.terms, contents, strict=True):
            scales[f"content-{content}"] += scale  # type: ignore[assignment]
        question = dataclasses.replace(question, terms=tuple(sorted(scales.items())))
        if question not in self._known:
            said = await ask(self._client, question.body, stream=False)
            assert said is not None
            self._known[question] = said
        return self._known[question]


async def check(url: str, names: Mapping[str, Name], answers: Sequence[Answer]) -> None:
    """Each answer is that of exactly one of the sets of contents that its names have stood for while it ran."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        truth = Truth(client)
        await truth.change("load")
        for answer in answers:
            stood_for = [names[name].during(answer.start, answer.end) for name, _ in answer.question.terms]
            if answer.said is None:
                assert any(None in contents for contents in stood_for), answer
                continue
            possible = [contents for contents in itertools.product(*stood_for) if None not in contents]
            for contents in possible:
                if answer.said == await truth.of(answer.question, contents):
                    break
            else:
                pytest.fail(f"{answer} is none of {possible}")
        await truth.change("unload")


def num_adapters() -> int:
    """Alive in this process."""
    gc.collect()
    return sum(type(thing) is Adapter for thing in gc.get_objects())


def test_two_hundred_changes_under_load(
    engine: Engine, url: str, root: Path, eventually: Callable[..., None]
) -> None:
    num_adapters_before = num_adapters()
    names = {name: Name() for name in (*STEADY, *GUESTS)}
    answers = asyncio.run(storm(url, root, names))
    slots, stats = engine._core.scheduler._adapters, engine.stats
    assert slots is not None
    # the engine lets go when it has told the end of a request, a moment later
    eventually(lambda: not slots._slots and num_adapters() == num_adapters_before)
    eventually(lambda: stats().kv_cache_usage == 0.0 and stats().num_running + stats().num_waiting == 0)
    asyncio.run(check(url, names, answers))
    answered = Counter(answer.said is not None for answer in answers)
    assert answered[True] > NUM_CHANGES
    assert answered[False] < len(answers) / 4, "only guests may be away"
