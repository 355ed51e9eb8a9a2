"""Cadenza against `transformers serve`, as clients see them: throughput, time to first token, inter-token latency.

    python benchmarks/serve.py                      # needs: pip install "transformers[serving]"
    python benchmarks/serve.py --concurrency 1 16 --rounds 1

Every server gets the same model folder, the same float32 weights and the same streamed chat requests (greedy,
the same prompts in the same order) on the same machine. Servers run one at a time; rounds take them in turn, and
the table shows medians over rounds, so that a slow minute of a shared machine hits all of them alike.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from cadenza.models import resolve

TOPICS = (
    *(
        "a lighthouse",
        "a clockmaker",
        "the first train",
        "a garden in winter",
        "an old map",
        "a violin",
        "a lost dog",
    ),
    *(
        "the harbour",
        "a storm at sea",
        "two brothers",
        "a mountain village",
        "a night market",
        "a letter",
        "a fox",
    ),
)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Server:
    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    num_tokens: int
    first_token: float
    """Seconds from sending the request to the first piece of text."""
    inter_token: float
    """Seconds per token after the first."""


@dataclass(frozen=True)
class Result:
    throughput: float
    first_token: float
    inter_token: float
    num_tokens: int


def servers(folder: Path, port: int) -> list[Server]:
    address = ("--host", "127.0.0.1", "--port", str(port))
    peer = (
        str(BIN / "transformers"),
        "serve",
        str(folder),
        *address,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    return [
        Server("cadenza", (str(BIN / "cadenza"), "serve", str(folder), *address, "--device", "cpu")),
        Server("transformers serve", peer),
        Server("transformers serve, continuous batching", (*peer, "--continuous-batching")),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A server process that has answered its first request; ended with its whole group."""

    def __init__(self, server: Server, url: str, model: str, log: Path) -> None:
        self._url, self._model = url, model
        self._process = subprocess.Popen(
            server.command,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    async def __aenter__(self) -> None:
        deadline = time.monotonic() + 180
        async with httpx.AsyncClient(timeout=120) as client:
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError(f"it exited with code {self._process.returncode}")
                try:
                    await ask(client, self._url, self._model, "Hello", 4)
                    return
                except (httpx.HTTPError, RuntimeError) as error:
                    if time.monotonic() > deadline:
                        await self.__aexit__()
                        raise RuntimeError(f"no answer in 180 s ({error})") from error
                    await asyncio.sleep(0.5)

    async def __aexit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


async def ask(client: httpx.AsyncClient, url: str, model: str, text: str, max_tokens: int) -> Answer:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode()[:200])
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                last = time.perf_counter()
                first = first or last
    if not num_tokens:
        raise RuntimeError("the answer has no usage")
    return Answer(num_tokens, first - start, (last - first) / max(num_tokens - 1, 1))


async def measure(url: str, model: str, concurrency: int, num_requests: int, max_tokens: int) -> Result:
    """`num_requests` requests, `concurrency` of them in flight at any time."""
    waiting = [
        f"Write a long story about {TOPICS[i % len(TOPICS)]}, part {i + 1}." for i in range(num_requests)
    ]
    answers: list[Answer] = []

    async def worker(client: httpx.AsyncClient) -> None:
        while waiting:
            answers.append(await ask(client, url, model, waiting.pop(0), max_tokens))

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - start
    num_tokens = sum(answer.num_tokens for answer in answers)
    return Result(
        num_tokens / seconds,
        statistics.median(answer.first_token for answer in answers),
        statistics.median(answer.inter_token for answer in answers),
        num_tokens,
    )


async def benchmark(options: argparse.Namespace, console: Console) -> dict[tuple[str, int], list[Result]]:
    folder = resolve(options.model)
    results: dict[tuple[str, int], list[Result]] = {}
    for number in range(options.rounds):
        port = free_port()
        for server in servers(folder, port):
            if options.only and server.name not in options.only:
                continue
            console.print(f"round {number + 1} of {options.rounds}: {server.name} …", style="dim")
            log = Path(options.log_folder) / f"{server.name.replace(' ', '-')}.log"
            try:
                url = f"http://127.0.0.1:{port}"
                # transformers serve calls a model by its path; Cadenza, served from a folder, by the folder's name
                model = folder.name if server.name == "cadenza" else str(folder)
                async with Running(server, url, model, log):
                    for concurrency in options.concurrency:
                        num_requests = max(options.requests, 2 * concurrency)
                        result = await measure(url, model, concurrency, num_requests, options.max_tokens)
                        results.setdefault((server.name, concurrency), []).append(result)
            except (RuntimeError, httpx.HTTPError) as error:
                console.print(f"  {server.name} could not be measured: {error!r} (see {log})", style="red")
    return results


def table(results: dict[tuple[str, int], list[Result]], concurrencies: list[int]) -> Table:
    out = Table(
        "concurrency", "server", "tokens/s", "first token, ms", "inter-token, ms", "tokens", "× throughput"
    )
    for concurrency in concurrencies:
        own = results.get(("cadenza", concurrency))
        for (name, at), rounds in results.items():
            if at != concurrency:
                continue
            speed = statistics.median(result.throughput for result in rounds)
            ratio = ""
            if own and name != "cadenza":
                ratio = f"{statistics.median(result.throughput for result in own) / speed:.1f}"
            out.add_row(
                str(concurrency),
                name,
                f"{speed:.1f}",
                f"{1e3 * statistics.median(result.first_token for result in rounds):.0f}",
                f"{1e3 * statistics.median(result.inter_token for result in rounds):.1f}",
                str(rounds[0].num_tokens),
                ratio,
            )
        out.add_section()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--requests", type=int, default=4, help="requests per measurement, at least 2 per stream"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of the servers to measure")
    parser.add_argument("--log-folder", default=".", help="where the servers' output goes")
    options = parser.parse_args()
    console = Console(width=120)
    results = asyncio.run(benchmark(options, console))
    console.print(table(results, options.concurrency))


if __name__ == "__main__":
    main()
