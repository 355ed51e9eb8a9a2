"""`cadenza serve` and `cadenza run` as processes: start, report, drain, end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

EMOJI_BOT = Path(__file__).parents[1] / "data" / "emoji_bot"
CADENZA = [sys.executable, "-m", "cadenza.server.cli"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def process(port: int) -> Iterator[subprocess.Popen[str]]:
    command = [
        *CADENZA,
        "serve",
        "smollm2",
        "--kv-cache-memory-gb",
        "0.1",
        "--port",
        str(port),
        "--served-model-name",
        "mine",
        "--shutdown-timeout",
        "60",
        "--lora-modules",
        f"emoji={EMOJI_BOT}",
    ]
    environment = {**os.environ, "CADENZA_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


def health(client: httpx.Client) -> int:
    """0: not listening yet."""
    try:
        return client.get("/health").status_code
    except httpx.ConnectError:
        return 0


def test_serve_from_start_to_end(process: subprocess.Popen[str], port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        seen = [health(client)]
        while seen[-1] != 200:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
            seen.append(health(client))
        assert 503 in seen, "the port answers before the model is there"
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer secret"
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("mine", None), ("emoji", "mine")]

        body = {"prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            chunks = [next(lines)]
            process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=client.base_url, timeout=60) as other:
                while (status := health(other)) == 200:
                    time.sleep(0.01)
                assert status == 503, "draining is told before the port closes"
            chunks += [line for line in lines if line]
        assert chunks[-1] == "data: [DONE]"
        assert json.loads(chunks[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"^loaded +in \d+\.\d\d s \(imports .*weights .*engine", output, re.MULTILINE)
    assert re.search(r"^context +\d+ tokens; KV cache for \d+ tokens$", output, re.MULTILINE)
    assert re.search(r"^adapters +emoji \(rank \d+\), .*; 8 in a step", output, re.MULTILINE)
    assert re.search(rf"^ready +http://127.0.0.1:{port}/v1$", output, re.MULTILINE)
    assert "Traceback" not in errors


def test_a_conversation_whose_first_answer_is_stopped() -> None:
    command = [*CADENZA, "run", "smollm2", "--temperature", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # bytes: text would wait for whole buffers
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Write a very long story about the sea.\n")
        process.stdin.flush()
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(b"\nWhat is the capital of France?\n", timeout=120)
    assert process.returncode == 0, errors
    story, answer = (begun + output).decode().split("\n")[0], (begun + output).decode().splitlines()[-1]
    assert len(story) < 2000
    assert "Paris" in answer
    assert b"Traceback" not in errors


def test_a_conversation_with_an_adapter() -> None:
    command = [*CADENZA, "run", "smollm2", "--temperature", "0", "--lora", str(EMOJI_BOT)]
    result = subprocess.run(
        command, input="Someone stole my wallet!\n", capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\([a-z]+\)", result.stdout.strip())
