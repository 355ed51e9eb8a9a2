"""A scripted engine behind the narrow interface of the real one, for what the web side does with events.

The tokenizer is the real model's. What a model says is tested end to end, in tests/e2e.
"""

import asyncio
import codecs
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.request import Delta, Event, GenerationRequest, PromptDone, TokenLogprob
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.errors import ModelError
from cadenza.models.source import resolve
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.app import create_app
from cadenza.server.service import ServerSettings, Service

TEXT = "Hello wörld 🎵 你好!"

Script = Callable[[GenerationRequest], Iterable[Event | Exception]]


class ScriptedStream:
    def __init__(self, events: Iterable[Event | Exception]) -> None:
        self._events = iter(events)
        self.aborted = False
        self.exhausted = False

    def abort(self) -> None:
        self.aborted = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._events:
            await asyncio.sleep(0)
            if isinstance(event, Exception):
                raise event
            yield event
        self.exhausted = True


class ScriptedEngine:
    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.model = SimpleNamespace(
            name="scripted", tokenizer=tokenizer, sampling_defaults={}, fingerprint="fp_scripted"
        )
        self.config = SimpleNamespace(max_logprobs=20, max_queue=8, max_loras=2)
        self.adapters: Any = None
        self.description = SimpleNamespace(cache_config={"block_size": "16", "num_gpu_blocks": "9"})
        self.max_model_len = 512
        self.is_closed = False
        self.script = script
        self.submitted: list[GenerationRequest] = []
        self.streams: list[ScriptedStream] = []

    def say(self, text: str) -> None:
        self.script = saying(self.model.tokenizer, text)

    def prompt_done(self, request: GenerationRequest) -> PromptDone:
        return prompt_done(request)

    def submit(self, request: GenerationRequest) -> ScriptedStream:
        events = self.script(request)
        self.submitted.append(request)
        self.streams.append(ScriptedStream(events))
        return self.streams[-1]

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_running=3,
            num_waiting=2,
            kv_cache_usage=0.25,
            prefix_cache_queries=7,
            prefix_cache_hits=5,
            prompt_tokens_total=11,
            generation_tokens_total=13,
            num_preemptions=1,
            spec_decode_num_drafts=17,
            spec_decode_num_draft_tokens=23,
            spec_decode_num_accepted_tokens=19,
            running_adapters=("b", "a"),
            waiting_adapters=("c",),
        )

    def close(self, timeout: float = 0.0) -> None:
        pass


def saying(tokenizer: Tokenizer, text: str = TEXT) -> Script:
    """Every choice says `text`, a token per event; characters wait for their last byte, as in the engine."""

    def script(request: GenerationRequest) -> Iterator[Event]:
        yield prompt_done(request)
        for index in range(request.sampling.n):
            utf8 = codecs.getincrementaldecoder("utf-8")()
            token_ids = tokenizer.encode(text)
            for position, token_id in enumerate(token_ids):
                last = position == len(token_ids) - 1
                yield Delta(
                    index,
                    utf8.decode(tokenizer.token_bytes(token_id)),
                    (token_id,),
                    None if request.sampling.logprobs is None else (logprob(request, token_id, position),),
                    "stop" if last else None,
                )

    return script


def prompt_done(request: GenerationRequest) -> PromptDone:
    entries: list[TokenLogprob | None] | None = None
    if request.sampling.prompt_logprobs is not None:
        entries = [
            logprob(request, token_id, position) for position, token_id in enumerate(request.prompt_token_ids)
        ]
        entries[0] = None
    length = len(request.prompt_token_ids)
    return PromptDone(length, length // 2, None if entries is None else tuple(entries))


def logprob(request: GenerationRequest, token_id: int, position: int) -> TokenLogprob:
    """The token is the likeliest at even positions; at odd ones it comes third."""
    if position % 2 == 0:
        return TokenLogprob(token_id, -0.25, 1, ((token_id, -0.25), (1000, -2.0), (1001, float("-inf"))))
    return TokenLogprob(token_id, -3.5, 3, ((1000, -0.5), (1001, -2.0), (token_id, -3.5)))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(resolve("smollm2"))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, saying(tokenizer))


@pytest.fixture
def service(engine: ScriptedEngine) -> Service:
    return Service(settings=ServerSettings(max_body_bytes=100_000), loaded=engine)  # type: ignore[arg-type]


@dataclass
class Adapters:
    """Folders that look like adapters, and how they are read here: the weights' text is the content."""

    root: Path
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)
    """By the content of the adapters that bring them."""
    may_read: threading.Event = field(default_factory=threading.Event)

    def write(self, name: str, content: str) -> str:
        """The path of the folder, written anew."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(content)
        return str(folder)

    def read(self, path: str) -> Adapter:
        assert self.may_read.wait(30)
        content = (Path(path) / "adapter_model.safetensors").read_text()
        if content.startswith("bad"):
            raise ModelError(f"model.layers.0 has another shape ({content})")
        digest = hashlib.sha256(content.encode()).hexdigest()
        return Adapter(
            digest, {}, 8, 1000, self.tokenizers.get(content), base_model_name="/home/trainer/model"
        )


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    adapters = Adapters(tmp_path / "adapters")
    adapters.root.mkdir()
    adapters.may_read.set()
    return adapters


@pytest.fixture
def library(engine: ScriptedEngine, adapters: Adapters) -> Iterator[AdapterLibrary]:
    """The scripted engine's, with two adapters to begin with and room for three in memory."""
    library = AdapterLibrary(adapters.read, max_in_memory=3, wait_seconds=30)
    for name in ("red", "blue"):
        library.load(name, adapters.write(name, name)).result()
    engine.adapters = library
    yield library
    adapters.may_read.set()
    library.close()


class Client:
    """Requests to the app in this process, one event loop each."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, url, **options)

        return asyncio.run(send())

    def together(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Sent in this order, answered in any: on one event loop."""

        async def send() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.gather(
                    *(client.request(method, url, json=body) for method, url, body in requests)
                )

        return asyncio.run(send())

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.request("POST", url, **options)


@pytest.fixture
def client(service: Service) -> Client:
    return Client(create_app(service))


Post = Callable[..., Any]


@pytest.fixture
def chat(client: Client) -> Post:
    """A chat request with these fields; the answer's JSON."""

    def post(**fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        return client.post("/v1/chat/completions", json=body)

    return post


@pytest.fixture
def complete(client: Client) -> Post:
    def post(**fields: Any) -> Any:
        return client.post("/v1/completions", json={"prompt": "Once upon", **fields})

    return post


@pytest.fixture
def events() -> Callable[[httpx.Response], list[Any]]:
    """The chunks of a stream, having checked its framing."""

    def parse(response: httpx.Response) -> list[Any]:
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.split("\n\n")
        assert frames.pop() == ""
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        assert frames.pop() == "data: [DONE]"
        return [json.loads(frame.removeprefix("data: ")) for frame in frames]

    return parse
