"""Many clients at once, clients that leave, and a queue with an end."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

PROMPTS = [f"Fact number {number}:" for number in range(64)]
NUM_TOKENS = 6


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **fields}


async def read_stream(client: httpx.AsyncClient, prompt: str) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json=body(prompt, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


async def leave_after_first_token(client: httpx.AsyncClient, prompt: str) -> None:
    """Ask for an answer that would take minutes, and hang up once it has begun."""
    long = body(prompt, stream=True, max_tokens=2000)
    async with client.stream("POST", "/v1/completions", json=long) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                return


def is_idle(metric: Callable[[str], float]) -> bool:
    return metric("num_requests_running") == metric("num_requests_waiting") == 0


def test_64_streams_of_which_32_are_dropped(
    base_url: str, http: httpx.Client, metric: Callable[[str], float], eventually: Callable[..., None]
) -> None:
    expected = http.post("/v1/completions", json=body(PROMPTS[0]) | {"prompt": PROMPTS[::2]}).json()[
        "choices"
    ]

    async def all_at_once() -> list[str | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base_url, timeout=120, limits=limits) as client:
            return list(
                await asyncio.gather(
                    *(
                        leave_after_first_token(client, prompt) if number % 2 else read_stream(client, prompt)
                        for number, prompt in enumerate(PROMPTS)
                    )
                )
            )

    texts = asyncio.run(all_at_once())
    assert texts[::2] == [choice["text"] for choice in expected]
    eventually(lambda: is_idle(metric))
    assert metric("kv_cache_usage_perc") == 0


def test_an_abandoned_whole_answer_frees_its_place(
    base_url: str, metric: Callable[[str], float], eventually: Callable[..., None]
) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            long = body("Endless", max_tokens=4000)
            asking = asyncio.create_task(client.post("/v1/completions", json=long))
            while await asyncio.to_thread(metric, "num_requests_running") < 1:
                await asyncio.sleep(0.01)
            asking.cancel()

    asyncio.run(leave())
    eventually(lambda: is_idle(metric))
    assert metric("kv_cache_usage_perc") == 0


def test_a_quick_question_does_not_wait_for_long_answers(
    base_url: str, http: httpx.Client, metric: Callable[[str], float], eventually: Callable[..., None]
) -> None:
    async def ask_beside_long_ones() -> str:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            long = body("Endless", max_tokens=4000, stream=True, n=2)
            async with client.stream("POST", "/v1/completions", json=long) as response:
                lines = response.aiter_lines()
                await anext(lines)
                answer = await client.post("/v1/completions", json=body("Quick", max_tokens=3))
                assert metric("num_requests_running") == 1, "the long one is still at it"
                return str(answer.json()["choices"][0]["text"])

    alone = http.post("/v1/completions", json=body("Quick", max_tokens=3)).json()["choices"][0]["text"]
    assert asyncio.run(ask_beside_long_ones()) == alone
    eventually(lambda: is_idle(metric))


def test_a_full_queue_is_a_429(http: httpx.Client, live_engine: Any) -> None:
    """As many prompts as may wait, three times over, in one step's time: the last ones find no room."""
    limit = live_engine.config.max_queue

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as client:
            many = body("", max_tokens=1) | {"prompt": ["x"] * limit}
            return list(await asyncio.gather(*(client.post("/v1/completions", json=many) for _ in range(3))))

    responses = asyncio.run(ask())
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert {response.status_code for response in responses} <= {200, 429}
    too_many = http.post("/v1/completions", json={"prompt": ["x"] * (limit + 1)})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt")
