"""Adapters through a live server over a small random model: who gets which, and swaps while requests run.

What each must say is what an engine says of it alone, one request at a time.
"""

import asyncio
import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.module import LoraModule
from cadenza.models import LoadedModel
from cadenza.models.adapters.locate import AdapterSources
from cadenza.server.service import ServerSettings, Service

ADMIN = {"authorization": "Bearer admin"}
PROMPT = "Once upon a time there was a small adapter. " * 9
"""Longer than a tile, so that its beginning comes from the prefix cache where that has it."""
FIELDS = {"prompt": PROMPT, "temperature": 0.9, "seed": 5, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(new_tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return dataclasses.replace(new_tiny_model(4), name="small")


@pytest.fixture(scope="module")
def folders(
    small: LoadedModel, make_adapter: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Adapters of four kinds, made by peft before any layer of the model is replaced."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, kind) in enumerate({"a": "lora", "b": "dora", "c": "rslora", "d": "lora_bias"}.items()):
        make_adapter(small.module, root / name, kind, seed, scale=0.5)
    return root


@pytest.fixture(scope="module")
def engine(small: LoadedModel, folders: Path) -> Iterator[Engine]:
    modules = tuple(LoraModule(name, str(folders / name)) for name in "ab")
    config = EngineConfig(
        kv_cache_memory_gb=0.05, enable_lora=True, lora_modules=modules, max_loras=2, max_cpu_loras=4
    )
    with Engine(small, config) as running:
        yield running


@pytest.fixture(scope="module")
def url(engine: Engine, folders: Path, serving: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    settings = ServerSettings(admin_api_keys=("admin",), adapter_sources=AdapterSources((folders,)))
    with serving(Service(loaded=engine, settings=settings)) as url:
        yield url


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Callable[[Mapping[str, float]], str]:
    """The text of `FIELDS` with these adapters, whose contents are those that their names have now."""

    def say(adapters: Mapping[str, float]) -> str:
        sampling = {name: value for name, value in FIELDS.items() if name != "prompt"}
        return engine.generate(PROMPT, adapter=dict(adapters), **sampling).text

    return say


def library_of(engine: Engine) -> AdapterLibrary:
    assert engine.adapters is not None
    return engine.adapters


async def ask(client: httpx.AsyncClient, *, stream: bool = False, **fields: Any) -> str:
    body = {**FIELDS, **fields, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not stream:
        text: str = response.json()["choices"][0]["text"]
        return text
    frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert frames.pop() == "[DONE]"
    return "".join(json.loads(frame)["choices"][0]["text"] for frame in frames)


WAYS: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({}, {}),
    ({"model": "small"}, {}),
    ({"model": "a"}, {"a": 1.0}),
    ({"model": "small:b"}, {"b": 1.0}),
    ({"lora": [{"id": "a", "scale": 0.5}]}, {"a": 0.5}),
    ({"lora": [{"id": 1, "scale": -1.0}]}, {"b": -1.0}),
    ({"lora": [{"id": "b", "scale": 0.5}, {"id": "a", "scale": 0.75}]}, {"a": 0.75, "b": 0.5}),
    ({"model": "a", "lora": [{"id": "b", "scale": 0.25}]}, {"a": 1.0, "b": 0.25}),
    ({"model": "a", "lora": [{"id": "b", "scale": 0.0}]}, {"a": 1.0}),
]


def test_a_batch_of_all_ways_to_name_adapters(url: str, alone: Callable[[Mapping[str, float]], str]) -> None:
    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            calls = [ask(client, stream=stream, **fields) for stream in (False, True) for fields, _ in WAYS]
            return await asyncio.gather(*calls)

    expected = [alone(adapters) for _, adapters in WAYS]
    assert len(set(expected)) == 7, "each set says something of its own"
    assert asyncio.run(together()) == expected * 2


def test_the_official_client(url: str, alone: Callable[[Mapping[str, float]], str]) -> None:
    sampling: dict[str, Any] = {name: value for name, value in FIELDS.items() if name != "ignore_eos"}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        cards = client.models.list().data
        assert [(card.id, getattr(card, "parent", "")) for card in cards] == [
            ("small", None),
            ("a", "small"),
            ("b", "small"),
        ]
        assert client.models.retrieve("b").id == "b"
        extra = {"ignore_eos": True, "lora": [{"id": "b", "scale": 0.25}]}
        answer = client.completions.create(model="a", extra_body=extra, **sampling)
        assert (answer.model, answer.choices[0].text) == ("a", alone({"a": 1.0, "b": 0.25}))
        stream = client.completions.create(
            model="small:a", extra_body={"ignore_eos": True}, stream=True, **sampling
        )
        chunks = list(stream)
        assert {chunk.model for chunk in chunks} == {"small:a"}
        assert "".join(chunk.choices[0].text for chunk in chunks) == alone({"a": 1.0})
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="nobody", prompt="x")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError):
            client.post("/unload_lora_adapter", body={"lora_name": "a"}, cast_to=object)


def test_swaps_under_load(
    url: str,
    engine: Engine,
    folders: Path,
    alone: Callable[[Mapping[str, float]], str],
    eventually: Callable[..., None],
) -> None:
    """No request fails, each is wholly of one content, and of one that the name stood for while it ran."""
    library = library_of(engine)
    before = {info.name: (info.generation, info.num_users) for info in library.list()}
    texts: dict[str, str] = {}
    for content in "abcd":
        library.load("probe", str(folders / content), in_place=True).result()
        texts[content] = alone({"probe": 1.0})
    library.unload("probe")
    assert len(set(texts.values())) == 4

    published = ["a"]
    """What the name has stood for, in order. It may still stand for the last but one: the last is being loaded."""
    num_answers = 0
    has_answered, is_over = asyncio.Event(), asyncio.Event()

    async def change(client: httpx.AsyncClient, verb: str, **fields: Any) -> int:
        body = {"lora_name": "swapped", **fields}
        response = await client.post(f"/v1/{verb}_lora_adapter", json=body, headers=ADMIN)
        assert response.status_code == 200, response.text
        return int(response.headers["x-lora-generation"])

    async def manage(client: httpx.AsyncClient, generation: int) -> None:
        for number in range(24):
            has_answered.clear()
            if number % 3 == 2:
                published.append(published[-2])
                changed = await change(client, "rollback", expected_generation=generation)
            else:
                published.append("abcd"[("abcd".index(published[-1]) + 1) % 4])
                changed = await change(
                    client, "load", lora_path=published[-1], expected_generation=generation
                )
            assert changed == generation + 1
            generation = changed
            await has_answered.wait()
        is_over.set()

    async def use(client: httpx.AsyncClient, stream: bool) -> None:
        nonlocal num_answers
        while not is_over.is_set():
            first = max(0, len(published) - 2)
            text = await ask(client, stream=stream, model="swapped")
            assert text in {texts[content] for content in published[first:]}
            num_answers += 1
            has_answered.set()

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            generation = await change(client, "load", lora_path="a")
            others = [ask(client), ask(client, model="b")]
            users = [use(client, stream=bool(number % 2)) for number in range(6)]
            answers = await asyncio.gather(manage(client, generation), *users, *others)
            assert answers[-2:] == [alone_base, texts["b"]]
            assert await ask(client, model="swapped") == texts[published[-1]]
            await change(client, "unload")

    alone_base = alone({})
    asyncio.run(run())
    assert num_answers >= 24
    # the engine lets go when it has told the end of a request, a moment later
    eventually(lambda: {info.name: (info.generation, info.num_users) for info in library.list()} == before)


def test_more_adapters_than_slots_and_memory(
    url: str,
    engine: Engine,
    folders: Path,
    alone: Callable[[Mapping[str, float]], str],
    eventually: Callable[..., None],
) -> None:
    """Six names over four contents, two slots, four places in memory: all are served, each its own."""
    library = library_of(engine)
    names = {name: name for name in "abcd"} | {"a2": "a", "c2": "c"}
    for name, content in names.items():
        if name not in "ab":
            library.load(name, str(folders / content)).result()
    expected = {name: alone({name: 1.0}) for name in names}
    assert len(set(expected.values())) == 4
    assert expected["a2"] == expected["a"]

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, model=name) for _ in range(2) for name in names))

    assert asyncio.run(together()) == list(expected.values()) * 2
    for name in names:
        if name not in "ab":
            library.unload(name)
    eventually(lambda: [info.num_users for info in library.list()] == [0, 0])


def test_the_example(url: str) -> None:
    script = Path(__file__).parents[2] / "examples" / "lora.sh"
    environment = {**os.environ, "CADENZA_ADMIN_API_KEY": "admin"}
    result = subprocess.run(
        ["sh", str(script), url, "c"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    sections = re.split(r"^# .*\n", result.stdout, flags=re.MULTILINE)
    _, loaded, asked, replaced, refused, listed, gone = sections
    assert loaded == replaced == "Success: LoRA adapter 'mood' added successfully\n"
    assert [json.loads(line)["model"] for line in asked.splitlines()] == ["mood", "small"]
    assert json.loads(refused)["error"]["code"] == "generation_mismatch"
    assert [entry["generation"] for entry in json.loads(listed)["data"] if entry["name"] == "mood"] == [2]
    removed, answer = gone.splitlines()
    assert removed == "Success: LoRA adapter 'mood' removed successfully"
    assert json.loads(answer)["error"]["code"] == "model_not_found"
