"""Statuses, headers and the error object: what every client sees, whatever it asks."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cadenza.decoding.request import EngineClosed, QueueFull
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.app import create_app
from cadenza.server.service import ServerSettings, Service

Post = Callable[..., Any]
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which has exactly OpenAI's four members."""
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"content": b"{", "headers": JSON}, "invalid_json"),
        ({"content": b"[]", "headers": JSON}, "invalid_json"),
        ({"content": b"", "headers": JSON}, "invalid_json"),
        ({"content": b'{"prompt": "x"}', "headers": {"content-type": "text/plain"}}, None),
        ({"content": b'{"prompt": "x"}'}, None),
        ({"data": {"prompt": "x"}}, None),
        ({"json": {"prompt": "x", "model": 5}}, None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bad_bodies(client: Any, path: str, options: dict[str, Any], code: str | None) -> None:
    response = client.post(path, **options)
    assert response.status_code == 400
    assert code is None or error_of(response)["code"] == code


def test_other_media_types_of_json(client: Any) -> None:
    for media_type in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        response = client.post(
            "/v1/completions", content=b'{"prompt":"x"}', headers={"content-type": media_type}
        )
        assert response.status_code == 200, media_type


def test_unknown_model(client: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = client.post(path, json={**body, "model": "gpt-9"})
        assert response.status_code == 404
        assert (error_of(response)["code"], error_of(response)["param"]) == ("model_not_found", "model")
    assert error_of(client.get("/v1/models/gpt-9"))["code"] == "model_not_found"


def test_unknown_paths_and_methods(client: Any) -> None:
    response = client.get("/v1/nothing")
    assert response.status_code == 404
    assert "GET /v1/nothing" in error_of(response)["message"]
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    error_of(response)
    assert client.get("/docs").status_code == 404


def test_a_body_that_is_too_large(client: Any) -> None:
    for options in (
        {"json": {"prompt": "x" * 100_001}},
        {"content": iter_bytes(b"x" * 60_000, b"x" * 60_000), "headers": JSON},
    ):
        response = client.post("/v1/completions", **options)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"


async def iter_bytes(*parts: bytes) -> Any:
    for part in parts:
        yield part


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFull("full"), 429), (EngineClosed("closed"), 503), (ZeroDivisionError("x"), 500)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_submission_raises(
    complete: Post, engine: Any, error: Exception, status: int, stream: bool
) -> None:
    """Also for a stream it is a status, not an event: nothing has been sent yet."""
    normal = engine.script

    def script(request: Any) -> Any:
        if len(engine.submitted) == 1:
            raise error
        return normal(request)

    engine.script = script
    response = complete(prompt=["one", "two"], stream=stream)
    assert response.status_code == status
    assert "retry-after" in response.headers or status == 500
    assert "division" not in error_of(response)["message"]
    assert [s.aborted for s in engine.streams] == [True], "the first prompt's request must not go on"


def test_request_ids(client: Any) -> None:
    given = client.get("/v1/models", headers={"x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    made = {client.get("/v1/nothing").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2


def test_while_loading_and_draining(client: Any, service: Service, complete: Post) -> None:
    engine, service.loaded = service.loaded, None
    for response in (client.get("/health"), client.get("/ping"), complete(), client.get("/v1/models")):
        assert response.status_code == 503
        assert error_of(response)["code"] == "loading"
    assert client.get("/metrics").status_code == 200
    service.loaded = engine
    assert client.get("/health").status_code == 200
    service.draining = True
    for response in (client.get("/health"), complete()):
        assert response.status_code == 503
        assert error_of(response)["code"] == "draining"


def test_a_dead_engine_is_not_healthy(client: Any, engine: Any, complete: Post) -> None:
    engine.is_closed = True
    for response in (client.get("/health"), complete()):
        assert response.status_code == 503
        assert error_of(response)["code"] == "stopped"


def test_keys(service: Service) -> None:
    service.settings = ServerSettings(api_keys=("first", "sécond"))

    async def status(path: str, key: bytes | None) -> int:
        transport = httpx.ASGITransport(create_app(service))
        headers = {} if key is None else {b"authorization": key}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get(path, headers=headers)
            if response.status_code == 401:
                assert error_of(response)["code"] == "invalid_api_key"
                assert "x-request-id" in response.headers
            return response.status_code

    def get(path: str, key: bytes | None) -> int:
        return asyncio.run(status(path, key))

    assert get("/v1/models", b"Bearer first") == 200
    assert get("/v1/models", "Bearer sécond".encode()) == 200
    assert get("/v1/models", b"bearer first") == 200
    for wrong in (None, b"Bearer", b"Bearer firs", b"Bearer first2", b"Basic first", b"first"):
        assert get("/v1/models", wrong) == 401
    assert get("/metrics", None) == 401
    assert get("/no/such/path", None) == 401
    assert get("/health", None) == get("/ping", None) == 200


def test_models(client: Any, service: Service) -> None:
    service.settings = ServerSettings(served_model_names=("gpt-4", "org/name"))
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["gpt-4", "org/name"]
    assert client.get("/v1/models/org/name").json() == listed["data"][1]
    assert client.get("/v1/models/scripted").status_code == 404
    body = {"prompt": "x"}
    assert client.post("/v1/completions", json=body).json()["model"] == "gpt-4"
    assert client.post("/v1/completions", json={**body, "model": "org/name"}).json()["model"] == "org/name"


def test_metrics(client: Any, complete: Post) -> None:
    complete()
    text = client.get("/metrics").text
    for line in (
        'cadenza:num_requests_running{model_name="scripted"} 3.0',
        'cadenza:num_requests_waiting{model_name="scripted"} 2.0',
        'cadenza:kv_cache_usage_perc{model_name="scripted"} 0.25',
        'cadenza:prefix_cache_queries_total{model_name="scripted"} 7.0',
        'cadenza:prefix_cache_hits_total{model_name="scripted"} 5.0',
        'cadenza:prompt_tokens_total{model_name="scripted"} 11.0',
        'cadenza:generation_tokens_total{model_name="scripted"} 13.0',
        'cadenza:spec_decode_num_drafts_total{model_name="scripted"} 17.0',
        'cadenza:spec_decode_num_draft_tokens_total{model_name="scripted"} 23.0',
        'cadenza:spec_decode_num_accepted_tokens_total{model_name="scripted"} 19.0',
        'cadenza:time_to_first_token_seconds_count{model_name="scripted"} 1.0',
        'cadenza:e2e_request_latency_seconds_count{model_name="scripted"} 1.0',
        'cadenza:cache_config_info{block_size="16",model_name="scripted",num_gpu_blocks="9"} 1.0',
    ):
        assert line in text.splitlines()


def test_inter_token_latency_counts_the_intervals(
    client: Any, complete: Post, tokenizer: Tokenizer, engine: Any
) -> None:
    complete()
    intervals = len(tokenizer.encode("Hello wörld 🎵 你好!")) - 1
    line = f'cadenza:inter_token_latency_seconds_count{{model_name="scripted"}} {intervals}.0'
    assert line in client.get("/metrics").text.splitlines()


def test_version(client: Any) -> None:
    assert client.get("/version").json()["version"].count(".") == 2


def test_tokenize(client: Any, tokenizer: Tokenizer) -> None:
    text = "Grüße, 世界 🎵"
    answer = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"] is None
    back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    answer = client.post("/tokenize", json={"prompt": "Hi there", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["Hi", " there"]


def test_tokenize_messages_as_chat_does(client: Any, chat: Post, engine: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.post("/tokenize", json={"messages": messages}).json()
    chat(messages=messages)
    assert tuple(answer["tokens"]) == engine.submitted[0].prompt_token_ids
    shorter = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["count"] < answer["count"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "x", "add_generation_prompt": True},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"prompt": 5},
        {"prompt": "x", "nonsense": 1},
    ],
)
def test_tokenize_refuses(client: Any, body: dict[str, Any]) -> None:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"]


def test_detokenize_refuses(client: Any) -> None:
    for tokens in ([-1], [10**7], ["a"], "abc", None):
        response = client.post("/detokenize", json={"tokens": tokens})
        assert response.status_code == 400
        assert error_of(response)["param"].startswith("tokens")


def test_tokenizer_info(client: Any, tokenizer: Tokenizer) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["vocab_size"] == tokenizer.vocab_size
    assert "im_start" in info["chat_template"]
