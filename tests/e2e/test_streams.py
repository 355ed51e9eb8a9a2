"""A stream says, byte for byte, what the whole answer says; and its frames are what SSE clients expect."""

import json
from typing import Any

import httpx
import pytest

from cadenza.decoding import Engine

PROMPT = "Once upon a time, in a village by the sea,"


def frames(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks, having checked each byte of the framing. Comments (pings) may stand between events."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        raw = b"".join(response.iter_raw())
    assert response.status_code == 200, raw
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    events = [event for event in raw.decode().split("\n\n") if not event.startswith(":")]
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed_text(http: httpx.Client, body: dict[str, Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in frames(http, "/v1/completions", body))


def completion(http: httpx.Client, body: dict[str, Any]) -> Any:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.parametrize("text", ["🎵 你好, 世界! Grüße", "👩‍👩‍👧‍👦🏳️‍🌈 é", "日本語のテキスト、한국어"])
def test_characters_of_many_tokens(http: httpx.Client, live_engine: Engine, text: str) -> None:
    """Only the tokens of such characters are allowed, in whatever order: whole characters and broken ones."""
    tokens = live_engine.tokenizer.encode(text)
    body = {"prompt": PROMPT, "allowed_token_ids": tokens, "max_tokens": 24, "seed": 1, "ignore_eos": True}
    whole = completion(http, {**body, "return_token_ids": True})
    assert streamed_text(http, body) == whole["text"]
    raw = b"".join(live_engine.tokenizer.token_bytes(token) for token in whole["token_ids"])
    assert whole["text"] == raw.decode(errors="replace")


def test_echo_of_characters_of_many_tokens(http: httpx.Client, live_engine: Engine) -> None:
    text = "🎵 你好, 世界! Grüße 👩‍👩‍👧‍👦"
    for prompt in (text, live_engine.tokenizer.encode(text)):
        body = {"prompt": prompt, "echo": True, "max_tokens": 3, "temperature": 0}
        whole = completion(http, body)["text"]
        assert whole.startswith(text)
        assert streamed_text(http, body) == whole
        assert completion(http, {**body, "max_tokens": 0})["text"] == text


def test_stop_strings_that_straddle_tokens(http: httpx.Client, live_engine: Engine) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    free = completion(http, {**body, "return_token_ids": True})
    pieces = [live_engine.tokenizer.token_string(token) for token in free["token_ids"]]
    for index in (2, 6):
        stop = pieces[index][-2:] + pieces[index + 1] + pieces[index + 2][:2]
        expected = free["text"][: free["text"].index(stop)]
        whole = completion(http, {**body, "stop": stop})
        assert (whole["text"], whole["finish_reason"], whole["stop_reason"]) == (expected, "stop", stop)
        seen = ""
        for chunk in frames(http, "/v1/completions", {**body, "stop": [stop, "never said"]}):
            seen += chunk["choices"][0]["text"]
            assert expected.startswith(seen), "a part of the stop string was sent"
        assert seen == expected
        included = completion(http, {**body, "stop": stop, "include_stop_str_in_output": True})
        assert included["text"] == expected + stop


def test_half_a_stop_string_at_the_end_is_not_lost(http: httpx.Client, live_engine: Engine) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    free = completion(http, body)["text"]
    body["stop"] = free[-6:] + " and then something that is never said"
    whole = completion(http, body)
    assert (whole["text"], whole["finish_reason"]) == (free, "length")
    assert streamed_text(http, body) == free


def test_a_chat_stream(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "Count to three."}],
        "temperature": 0,
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
    }
    chunks = frames(http, "/v1/chat/completions", body)
    del body["stream_options"]
    whole = http.post("/v1/chat/completions", json=body).json()
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    message = whole["choices"][0]["message"]
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == message["content"]
    entries = [entry for choice in deltas for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert [choice["finish_reason"] for choice in deltas if choice["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    final = {**chunks[-1]["usage"], "prompt_tokens_details": None}
    assert final == {**whole["usage"], "prompt_tokens_details": None}


def test_special_tokens_are_shown_only_on_request(http: httpx.Client, live_engine: Engine) -> None:
    special = min(live_engine.tokenizer.special_ids - set(live_engine.model.eos_token_ids))
    body = {"prompt": PROMPT, "allowed_token_ids": [special], "max_tokens": 2}
    assert completion(http, body)["text"] == ""
    shown = completion(http, {**body, "skip_special_tokens": False})["text"]
    assert shown == 2 * live_engine.tokenizer.token_string(special)
