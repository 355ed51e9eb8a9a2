"""What a request names is what the engine gets: the model, an adapter, a weighted set; held until then, no longer."""

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.models.tokenizer import Tokenizer
from cadenza.server.service import ServerSettings, Service

Post = Callable[..., Any]


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def named(adapters: AdapterSet | None) -> dict[str, float]:
    """The scales by the first letters of digests."""
    return {} if adapters is None else {term.adapter.digest[:8]: term.scale for term in adapters.terms}


@pytest.fixture
def digest(library: AdapterLibrary) -> Callable[[str], str]:
    def find(name: str) -> str:
        return next(info.digest for info in library.list() if info.name == name)[:8]

    return find


@pytest.fixture
def users(library: AdapterLibrary) -> Callable[[], int]:
    return lambda: sum(info.num_users for info in library.list())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"model": "scripted"}, {}),
        ({"lora": []}, {}),
        ({"model": "red"}, {"red": 1.0}),
        ({"model": "scripted:red"}, {"red": 1.0}),
        ({"lora": [{"id": "red", "scale": 0.5}]}, {"red": 0.5}),
        ({"lora": [{"id": 1, "scale": -2}]}, {"blue": -2.0}),
        ({"model": "scripted", "lora": [{"id": "red", "scale": 0}]}, {}),
        (
            {"lora": [{"id": "red", "scale": 0.25}, {"id": "blue", "scale": 0.75}]},
            {"red": 0.25, "blue": 0.75},
        ),
        ({"model": "red", "lora": [{"id": "blue", "scale": 0.5}]}, {"red": 1.0, "blue": 0.5}),
    ],
)
def test_what_the_engine_gets(
    client: Any,
    engine: Any,
    digest: Callable[[str], str],
    users: Callable[[], int],
    path: str,
    stream: bool,
    fields: dict[str, Any],
    expected: dict[str, float],
) -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    response = client.post(path, json={**prompt, **fields, "stream": stream})
    assert response.status_code == 200, response.text
    assert named(engine.submitted[0].adapters) == {digest(name): scale for name, scale in expected.items()}
    assert users() == 0, "the server does not hold what only the engine needs"
    if not stream:
        assert response.json()["model"] == fields.get("model", "scripted"), "as the client has named it"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "green"}, (404, "model", "model_not_found")),
        ({"model": "scripted:green"}, (404, "model", "model_not_found")),
        ({"model": "other:red"}, (404, "model", "model_not_found")),
        ({"model": "red:scripted"}, (404, "model", "model_not_found")),
        ({"model": "scripted:"}, (404, "model", "model_not_found")),
        (
            {"lora": [{"id": "red", "scale": 1}, {"id": "green", "scale": 1}]},
            (404, "lora[1].id", "model_not_found"),
        ),
        ({"lora": [{"id": "scripted:red", "scale": 1}]}, (404, "lora[0].id", "model_not_found")),
        ({"lora": [{"id": "", "scale": 1}]}, (404, "lora[0].id", "model_not_found")),
        ({"lora": [{"id": 2, "scale": 1}]}, (404, "lora[0].id", "model_not_found")),
        ({"lora": [{"id": -1, "scale": 0}]}, (404, "lora[0].id", "model_not_found")),
        ({"lora": [{"id": "red", "scale": 1}, {"id": "red", "scale": 1}]}, (400, "lora[1].id", None)),
        ({"lora": [{"id": "red", "scale": 1}, {"id": 0, "scale": 1}]}, (400, "lora[1].id", None)),
        ({"model": "red", "lora": [{"id": "red", "scale": 0.5}]}, (400, "lora[0].id", None)),
        ({"lora": [{"id": "red"}]}, (400, "lora[0].scale", "missing_required_parameter")),
        ({"lora": [{"scale": 1}]}, (400, "lora[0].id", "missing_required_parameter")),
        ({"lora": [{"id": 1.5, "scale": 1}]}, (400, "lora[0].id", None)),
        ({"lora": [{"id": True, "scale": 1}]}, (400, "lora[0].id", None)),
        ({"lora": [{"id": "red", "scale": "1"}]}, (400, "lora[0].scale", None)),
        ({"lora": [{"id": "red", "scale": 101}]}, (400, "lora[0].scale", None)),
        ({"lora": [{"id": "red", "scale": 1, "path": "x"}]}, (400, "lora[0].path", "unknown_parameter")),
        ({"lora": {"id": "red", "scale": 1}}, (400, "lora", None)),
    ],
)
def test_what_it_does_not_get(
    client: Any,
    engine: Any,
    users: Callable[[], int],
    fields: dict[str, Any],
    error: tuple[int, str, str | None],
) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", **fields})
    assert error_of(response) == error
    assert engine.submitted == []
    assert users() == 0


def test_an_infinite_scale(client: Any, library: AdapterLibrary) -> None:
    body = b'{"prompt": "x", "lora": [{"id": "red", "scale": 1e999}]}'
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error_of(response) == (400, "lora[0].scale", None)


def test_more_adapters_than_a_step_has_room_for(
    client: Any, engine: Any, library: AdapterLibrary, adapters: Any
) -> None:
    library.load("green", adapters.write("green", "green")).result()
    lora = [{"id": name, "scale": 1.0} for name in ("red", "blue", "green")]
    response = client.post("/v1/completions", json={"prompt": "x", "lora": lora})
    assert error_of(response) == (400, "lora", None)
    assert "3 adapters" in response.text
    lora[1]["scale"] = 0.0
    assert client.post("/v1/completions", json={"prompt": "x", "lora": lora}).status_code == 200


def test_without_adapters(client: Any, engine: Any) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "lora": [{"id": "red", "scale": 1.0}]})
    assert error_of(response) == (400, "lora", None)
    assert "--enable-lora" in response.text
    assert client.post("/v1/completions", json={"prompt": "x", "lora": []}).status_code == 200
    for model in ("red", "scripted:red"):
        response = client.post("/v1/completions", json={"prompt": "x", "model": model})
        assert error_of(response) == (404, "model", "model_not_found")


def test_names_of_models_may_have_colons(
    client: Any, engine: Any, service: Service, library: AdapterLibrary, digest: Callable[[str], str]
) -> None:
    service.settings = ServerSettings(served_model_names=("a", "a:b", "org/c:1"))
    for model, expected in (
        ("a:b", {}),
        ("a:b:red", {"red": 1.0}),
        ("org/c:1:red", {"red": 1.0}),
        ("red", {"red": 1.0}),
    ):
        assert client.post("/v1/completions", json={"prompt": "x", "model": model}).status_code == 200
        assert named(engine.submitted[-1].adapters) == {digest(name): 1.0 for name in expected}
    response = client.post("/v1/completions", json={"prompt": "x", "model": "scripted:red"})
    assert error_of(response) == (404, "model", "model_not_found")


def test_a_swap_while_prompts_are_submitted(
    client: Any, engine: Any, library: AdapterLibrary, adapters: Any, users: Callable[[], int]
) -> None:
    """All prompts of a request are computed with the same content; the next request's with the new one."""
    script = engine.script

    def swapping(request: Any) -> Any:
        if not engine.submitted:
            library.load("red", adapters.write("red", "crimson"), in_place=True).result()
        return script(request)

    engine.script = swapping
    body = {"prompt": ["one", "two", "three"], "model": "red"}
    before = client.post("/v1/completions", json=body).json()["system_fingerprint"]
    after = client.post("/v1/completions", json=body).json()["system_fingerprint"]
    digests = [request.adapters.terms[0].adapter.digest for request in engine.submitted]
    assert len(set(digests[:3])) == len(set(digests[3:])) == 1
    assert digests[0] != digests[3]
    base = client.post("/v1/completions", json={"prompt": "x"}).json()["system_fingerprint"]
    assert len({before, after, base}) == 3, "the fingerprint changes with the weights"
    assert before.startswith(base)
    nothing = {"prompt": "x", "lora": [{"id": "red", "scale": 0}]}
    assert client.post("/v1/completions", json=nothing).json()["system_fingerprint"] == base
    assert users() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"logprobs": 99},
        {"prompt": [10**7]},
        {"prompt": ["x"] * 9},
        {"structured_outputs": {"regex": "("}},
    ],
)
def test_a_request_that_is_refused_lets_go(
    client: Any, engine: Any, users: Callable[[], int], library: AdapterLibrary, fields: dict[str, Any]
) -> None:
    failed: Future[Any] = Future()
    failed.set_exception(ConstraintError("no such pattern"))
    engine.constraints = SimpleNamespace(compile=lambda spec: failed)
    engine.model.eos_token_ids = (2,)
    response = client.post("/v1/completions", json={"prompt": "x", "model": "red", **fields})
    assert response.status_code == 400, response.text
    assert engine.submitted == []
    assert users() == 0


def test_other_requests_go_on_while_an_adapter_is_loaded(
    client: Any, engine: Any, library: AdapterLibrary, adapters: Any, users: Callable[[], int]
) -> None:
    make_cold(library, adapters)
    adapters.may_read.clear()
    script = engine.script

    def then_read(request: Any) -> Any:
        if request.adapters is None:
            adapters.may_read.set()  # only now: the cold request cannot have been first
        return script(request)

    engine.script = then_read
    cold, warm, base = client.together(
        ("POST", "/v1/completions", {"prompt": "x", "model": "red"}),
        ("POST", "/v1/completions", {"prompt": "x", "model": "pink3"}),
        ("POST", "/v1/completions", {"prompt": "x"}),
    )
    assert [cold.status_code, warm.status_code, base.status_code] == [200, 200, 200]
    assert [bool(request.adapters) for request in engine.submitted][-1], "the cold one came last"
    assert engine.submitted[-1].adapters.names == ("red",)
    assert users() == 0


def make_cold(library: AdapterLibrary, adapters: Any) -> None:
    """Three others take the room of the first two."""
    for number in (1, 2, 3):
        library.load(f"pink{number}", adapters.write(f"pink{number}", f"pink{number}")).result()
    assert not next(info.is_in_memory for info in library.list() if info.name == "red")


def test_as_many_wait_as_may_wait(
    client: Any, engine: Any, library: AdapterLibrary, adapters: Any, users: Callable[[], int]
) -> None:
    make_cold(library, adapters)
    adapters.may_read.clear()
    engine.config.max_queue = 1
    script = engine.script

    def then_read(request: Any) -> Any:
        if request.adapters is None:
            adapters.may_read.set()
        return script(request)

    engine.script = then_read
    body = {"prompt": "x", "model": "red"}
    first, second, _ = client.together(
        ("POST", "/v1/completions", body),
        ("POST", "/v1/completions", body),
        ("POST", "/v1/completions", {"prompt": "x"}),
    )
    assert first.status_code == 200
    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert users() == 0


def test_no_room_in_time(client: Any, engine: Any, adapters: Any) -> None:
    library = AdapterLibrary(adapters.read, max_in_memory=1, wait_seconds=0.0)
    engine.adapters = library
    for name in ("red", "blue"):
        library.load(name, adapters.write(name, name)).result()
    adapters.may_read.clear()
    response = client.post("/v1/completions", json={"prompt": "x", "model": "red"})
    adapters.may_read.set()
    library.close()
    assert error_of(response) == (503, None, "adapters_busy")
    assert response.headers["retry-after"] == "1"


def test_files_that_have_changed_meanwhile(
    client: Any,
    library: AdapterLibrary,
    adapters: Any,
    users: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No fault of the client's, and none that it can mend: the operator is told, too."""
    make_cold(library, adapters)
    adapters.write("red", "crimson")
    response = client.post("/v1/completions", json={"prompt": "x", "model": "red"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "adapter_unreadable"
    assert str(adapters.root) not in response.text, "no path of this machine's"
    assert any("'red'" in record.message for record in caplog.records if record.levelname == "WARNING")
    assert users() == 0


# an adapter's own tokenizer


@pytest.fixture
def shouting(tokenizer: Tokenizer, library: AdapterLibrary, adapters: Any) -> Tokenizer:
    """Another chat template, brought by the adapter `loud`."""
    loud = Tokenizer(
        tokenizer._fast, chat_template="LOUD {% for m in messages %}{{ m.content | upper }}{% endfor %}"
    )
    adapters.tokenizers["loud"] = loud
    library.load("loud", adapters.write("loud", "loud")).result()
    return loud


def test_its_template_makes_the_prompt(chat: Post, engine: Any, shouting: Tokenizer) -> None:
    chat(model="loud")
    assert shouting.decode(engine.submitted[0].prompt_token_ids) == "LOUD HI"
    chat(lora=[{"id": "red", "scale": 1.0}, {"id": "loud", "scale": 0.5}])
    assert shouting.decode(engine.submitted[1].prompt_token_ids) == "LOUD HI"
    chat(model="red")
    assert "im_start" in shouting.decode(engine.submitted[2].prompt_token_ids, skip_special_tokens=False)


def test_two_tokenizers_in_one_set(
    chat: Post, tokenizer: Tokenizer, shouting: Tokenizer, adapters: Any, library: AdapterLibrary
) -> None:
    adapters.tokenizers["quiet"] = Tokenizer(tokenizer._fast, chat_template="...")
    library.load("quiet", adapters.write("quiet", "quiet")).result()
    response = chat(model="loud", lora=[{"id": "quiet", "scale": 1.0}])
    assert error_of(response) == (400, "lora", None)
    assert [info.num_users for info in library.list()] == [0] * len(library.list())


def test_tokenizing_with_an_adapter(client: Any, shouting: Tokenizer, users: Callable[[], int]) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for model, text in (("loud", "LOUD HI"), ("scripted:loud", "LOUD HI")):
        tokens = client.post("/tokenize", json={"model": model, "messages": messages}).json()["tokens"]
        assert shouting.decode(tokens) == text
        back = client.post("/detokenize", json={"model": model, "tokens": tokens}).json()
        assert back == {"prompt": text}
    assert "LOUD" in client.get("/tokenizer_info?model=loud").json()["chat_template"]
    assert "LOUD" not in client.get("/tokenizer_info").json()["chat_template"]
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        response = client.post(path, json={**body, "model": "green"})
        assert error_of(response) == (404, "model", "model_not_found")
    assert client.get("/tokenizer_info?model=green").status_code == 404
    assert users() == 0
