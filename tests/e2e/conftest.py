"""A live server with the real model on a real socket: the same app and the same uvicorn as `cadenza serve`."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.adapters.module import LoraModule
from cadenza.models import LoadConfig
from cadenza.server.http_server import DrainingServer
from cadenza.server.service import Service

MAX_QUEUE = 96
EMOJI_BOT = Path(__file__).parents[1] / "data" / "emoji_bot"


@pytest.fixture(scope="session")
def live_engine() -> Iterator[Engine]:
    engine = Engine.load(
        "smollm2",
        LoadConfig(dtype="float32", device="cpu"),
        EngineConfig(
            kv_cache_memory_gb=0.5,
            max_queue=MAX_QUEUE,
            enable_lora=True,
            lora_modules=(LoraModule("emoji", str(EMOJI_BOT)),),
        ),
    )
    yield engine
    engine.close()


@contextmanager
def _serving(service: Service) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = DrainingServer(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="live-server")
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.stop()
    thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[[Service], AbstractContextManager[str]]:
    """with serving(service) as url: a server in a thread of its own."""
    return _serving


@pytest.fixture(scope="session")
def base_url(live_engine: Engine) -> Iterator[str]:
    with _serving(Service(loaded=live_engine)) as url:
        yield url


@pytest.fixture(scope="session")
def speculating_url() -> Iterator[str]:
    """The same model and adapter with `--speculative ngram`, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "cadenza.server.cli",
        "serve",
        "smollm2",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    options = ["--kv-cache-memory-gb", "0.5", "--host", "127.0.0.1", "--port", port, "--speculative", "ngram"]
    options += ["--lora-modules", f"emoji={EMOJI_BOT}"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        assert process.poll() is None, "the server has ended"
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="session")
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def metric(http: httpx.Client) -> Callable[[str], float]:
    """The value of a metric right now."""

    def read(name: str) -> float:
        for line in http.get("/metrics").text.splitlines():
            if line.startswith(f"cadenza:{name}{{"):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    return read


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """Waits until a condition holds, and fails if it does not within `seconds`."""

    def wait(condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.01)

    return wait
