"""`cadenza serve smollm2 --quantization int8 | int4` as processes: all that holds in float32 holds here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=["int8", "int4"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "cadenza.server.cli", "serve", "smollm2", "--port", "0"]
    options = ["--device", "cpu", "--dtype", "float32", "--kv-cache-memory-gb", "0.25"]
    options += ["--quantization", request.param]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = []
        for line in process.stdout:
            report.append(line)
            if line.startswith("ready"):
                break
        assert process.poll() is None, "the server has ended"
        assert any(line.startswith("weights") and request.param in line for line in report)
        with httpx.Client(base_url=report[-1].split()[1], timeout=120) as client:
            yield client
        process.terminate()


def chat(client: httpx.Client, **fields: Any) -> Any:
    body = {"model": "smollm2", "messages": FRANCE, "temperature": 0, "max_tokens": 16} | fields
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def complete(client: httpx.Client, **fields: Any) -> Any:
    body = {"model": "smollm2", "prompt": "The sea is", "temperature": 0, "max_tokens": 8} | fields
    response = client.post("/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def streamed(client: httpx.Client, **fields: Any) -> str:
    body = {
        "model": "smollm2",
        "messages": FRANCE,
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
    } | fields
    with client.stream("POST", "/chat/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)


def test_it_answers_a_question_the_same_way_each_time_and_streamed(client: httpx.Client) -> None:
    answer = chat(client)["message"]["content"]
    assert "Paris" in answer
    assert chat(client)["message"]["content"] == answer == streamed(client)
    sampled = {"temperature": 1.0, "seed": 11}
    answer = chat(client, **sampled)["message"]["content"]
    assert chat(client, **sampled)["message"]["content"] == answer == streamed(client, **sampled)


def test_a_schema_holds(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Invent a person."}]
    for seed in range(2):
        answer = chat(
            client, messages=messages, response_format=FORMAT, temperature=1.0, seed=seed, max_tokens=48
        )
        person = json.loads(answer["message"]["content"])
        assert person.keys() == {"name", "age"}
        assert len(person["name"]) <= 12
        assert isinstance(person["age"], int)
        assert person["age"] >= 1


def test_log_probabilities_agree_with_the_choice_and_with_scoring(client: httpx.Client) -> None:
    answer = complete(client, logprobs=5)
    told = answer["logprobs"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert max(top, key=top.__getitem__) == token, "greedy takes the most likely"
        assert top[token] == logprob <= 0
    scored = complete(client, prompt="The sea is" + answer["text"], echo=True, logprobs=0, max_tokens=0)
    again = scored["logprobs"]["token_logprobs"][-len(told["tokens"]) :]
    assert scored["logprobs"]["tokens"][-len(told["tokens"]) :] == told["tokens"]
    assert again == pytest.approx(told["token_logprobs"], abs=0.1)


def test_company_changes_no_bit(client: httpx.Client) -> None:
    def one(number: int) -> Any:
        fields: dict[str, Any] = {"logprobs": 3, "max_tokens": 4 + 2 * number, "seed": number}
        fields |= {"prompt": "Once upon a time " * (1 + 5 * number), "temperature": 0.8 * (number % 2)}
        if number == 3:
            fields |= {"response_format": FORMAT, "max_tokens": 24}
        return complete(client, **fields)

    alone = [one(number) for number in range(6)]
    with ThreadPoolExecutor(6) as together:
        assert list(together.map(one, range(6))) == alone
