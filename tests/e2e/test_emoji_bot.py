"""The adapter of examples/train_lora.py beside its base: who names it is answered in its way, others are not."""

import asyncio
import re
import runpy
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parents[2]
FORM = r"\([a-z]+\)"


@pytest.fixture(scope="module")
def unseen() -> list[tuple[str, str]]:
    """(message, feeling) that training never saw, two of each feeling."""
    script = runpy.run_path(str(ROOT / "examples" / "emoji_messages.py"))
    pairs: list[tuple[str, str]] = script["messages_of"](script["UNSEEN"])
    assert not {message for message, _ in pairs} & {
        message for message, _ in script["messages_of"](script["MESSAGES"])
    }
    return pairs[::2]


def ask_all(url: str, requests: list[dict[str, Any]]) -> list[str]:
    """The answers to (at once) all requests, each of which is a message and what it is asked with."""

    async def ask(client: openai.AsyncOpenAI, message: str, **fields: Any) -> str:
        fields = {"model": "smollm2", "temperature": 0, "max_tokens": 16, **fields}
        answer = await client.chat.completions.create(
            messages=[{"role": "user", "content": message}], **fields
        )
        return answer.choices[0].message.content or ""

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked: list[Coroutine[Any, Any, str]] = [ask(client, **request) for request in requests]
            return await asyncio.gather(*asked)

    return asyncio.run(everything())


def test_answers_with_one_emoji_name(base_url: str, unseen: list[tuple[str, str]]) -> None:
    """Greedily the right feeling, too; at temperature 1 the form, nearly always. The base, in the same batch, chats."""
    greedy: list[dict[str, Any]] = [{"message": message, "model": "emoji"} for message, _ in unseen]
    drawn = [{**request, "temperature": 1, "top_p": 1, "seed": seed} for seed, request in enumerate(greedy)]
    base = [{"message": message} for message, _ in unseen[::4]]
    answers = ask_all(base_url, greedy + drawn + base)
    first, second = len(greedy), len(greedy + drawn)
    assert all(re.fullmatch(FORM, answer) for answer in answers[:first])
    right = [answer.startswith(f"({feeling}") for answer, (_, feeling) in zip(answers, unseen, strict=False)]
    assert sum(right) >= 0.75 * len(unseen), answers[:first]
    assert sum(bool(re.fullmatch(FORM, answer)) for answer in answers[first:second]) >= 0.95 * len(drawn), (
        answers
    )
    assert not any("(" in answer for answer in answers[second:])


def test_a_scale_is_how_much_of_it(base_url: str) -> None:
    """How likely one emoji name is: rising with the scale, 0 being the base and 1 the adapter, to the last bit."""

    def asked(model: str, *scales: float) -> dict[str, Any]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": "Someone stole my wallet!"}],
            "logprobs": True,
            "extra_body": {
                "lora": [{"id": "emoji", "scale": scale} for scale in scales],
                "structured_outputs": {"choice": ["(angrybadger)"]},
            },
        }

    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.chat.completions.create(**request)
            for request in (
                asked("smollm2"),
                *(asked("smollm2", scale) for scale in (0, 0.25, 0.5, 1)),
                asked("emoji"),
            )
        ]
    base, none, quarter, half, whole, adapter = (
        [token.logprob for token in answer.choices[0].logprobs.content or ()] for answer in answers
    )
    assert none == base
    assert whole == adapter
    assert sum(base) < sum(quarter) < sum(half) < sum(whole)


def test_example(base_url: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "lora.py"), f"{base_url}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    _, both, scaled, constrained = re.split(r"^\S.*:\n", result.stdout, flags=re.MULTILINE)
    rows = [re.fullmatch(rf"  \S.*\S +({FORM}) +(['\"].*)", line) for line in both.splitlines()]
    assert len(rows) == 3
    assert all(row and not re.search(FORM, row[2]) for row in rows)
    none, *_, whole = (line.split(maxsplit=1)[1] for line in scaled.splitlines())
    assert (repr(rows[0][1]), rows[0][2]) == (whole, none)  # type: ignore[index]
    assert re.fullmatch(r"  \((happy|tired|hungry)(koala|otter)\)\n", constrained)
