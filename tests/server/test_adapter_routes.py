"""Adapters are changed while the server runs: by whom, from where, and with which words."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.models.adapters.locate import AdapterSources
from cadenza.server.app import create_app
from cadenza.server.service import ServerSettings, Service

PATHS = ("load_lora_adapter", "unload_lora_adapter", "rollback_lora_adapter")
NAME = {"lora_name": "red"}


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


@pytest.fixture
def open_service(service: Service, adapters: Any) -> Service:
    """Whoever may ask may change adapters."""
    sources = AdapterSources((adapters.root,))
    service.settings = ServerSettings(allows_keyless_updates=True, adapter_sources=sources)
    return service


@pytest.fixture
def admin(open_service: Service, library: AdapterLibrary, client: Any) -> Any:
    return type(client)(create_app(open_service))


def load(client: Any, name: str, path: str, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **fields}
    response: httpx.Response = client.post("/v1/load_lora_adapter", json=body)
    return response


def generation(library: AdapterLibrary, name: str) -> int:
    return next(info.generation for info in library.list() if info.name == name)


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_life(admin: Any, engine: Any, adapters: Any, prefix: str) -> None:
    def post(verb: str, **fields: Any) -> tuple[int, str, str]:
        response = admin.post(f"{prefix}/{verb}_lora_adapter", json={"lora_name": "green", **fields})
        assert response.headers["content-type"] == "text/plain; charset=utf-8", response.text
        return response.status_code, response.text, response.headers["x-lora-generation"]

    def ask() -> str:
        assert admin.post("/v1/completions", json={"prompt": "x", "model": "green"}).status_code == 200
        digest: str = engine.submitted[-1].adapters.terms[0].adapter.digest
        return digest

    path = adapters.write("green", "green")
    added = "Success: LoRA adapter 'green' added successfully"
    assert post("load", lora_path=path) == (200, added, "1")
    first = ask()
    adapters.write("green", "emerald")
    assert post("load", lora_path=path, load_inplace=True) == (200, added, "2")
    second = ask()
    assert first != second
    back = admin.post("/v1/rollback_lora_adapter", json={"lora_name": "green"})
    assert back.text == "Success: LoRA adapter 'green' rolled back successfully"
    assert back.headers["x-lora-generation"] == "3"
    assert ask() == first
    assert post("unload") == (200, "Success: LoRA adapter 'green' removed successfully", "3")
    assert admin.post("/v1/completions", json={"prompt": "x", "model": "green"}).status_code == 404


def test_what_there_is(admin: Any, adapters: Any, library: AdapterLibrary) -> None:
    load(admin, "green", adapters.write("green", "green"), pinned=True)
    load(admin, "red", adapters.write("red", "crimson"), load_inplace=True)
    listed = admin.get("/v1/lora_adapters")
    assert listed.json()["object"] == "list"
    entries = listed.json()["data"]
    assert [entry["name"] for entry in entries] == ["red", "blue", "green"]
    assert [entry["id"] for entry in entries] == [0, 1, 2]
    assert [entry["generation"] for entry in entries] == [2, 1, 1]
    assert [entry["previous_generation"] for entry in entries] == [1, None, None]
    assert [entry["pinned"] for entry in entries] == [False, False, True]
    assert {entry["parent"] for entry in entries} == {"scripted"}
    assert set(entries[0]) == {
        *("id", "name", "parent", "generation", "previous_generation", "digest", "rank", "num_bytes"),
        *("pinned", "in_memory", "users", "created"),
    }
    held = library.acquire([("green", 1.0)]).result()
    assert [entry["users"] for entry in admin.get("/v1/lora_adapters").json()["data"]] == [0, 0, 1]
    held.release()
    for text in (listed.text, admin.get("/v1/models").text):
        assert "/home/trainer" not in text
        assert str(adapters.root) not in text


def test_numbers_stay_with_their_names(admin: Any, adapters: Any) -> None:
    def numbers() -> dict[str, int]:
        return {entry["name"]: entry["id"] for entry in admin.get("/v1/lora_adapters").json()["data"]}

    admin.post("/v1/unload_lora_adapter", json={"lora_name": "red"})
    load(admin, "green", adapters.write("green", "green"))
    assert numbers() == {"blue": 1, "green": 2}
    load(admin, "red", adapters.write("red", "red"))
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "blue"})
    assert numbers() == {"red": 0, "green": 2}
    response = admin.post("/v1/completions", json={"prompt": "x", "lora": [{"id": 1, "scale": 1.0}]})
    assert error_of(response)[0] == 404, "the number of a name that is gone is no other's"


def test_models_and_their_adapters(admin: Any, open_service: Service, adapters: Any) -> None:
    cards = admin.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("scripted", "scripted", None),
        ("red", "scripted", "scripted"),
        ("blue", "scripted", "scripted"),
    ]
    assert admin.get("/v1/models/red").json() == cards[1]
    assert admin.get("/v1/models/scripted:red").json() == {**cards[1], "id": "scripted:red"}
    for name in ("scripted:green", "other:red", "scripted:scripted", "red:red"):
        assert admin.get(f"/v1/models/{name}").status_code == 404
    assert {tuple(card) for card in cards} == {tuple(cards[0])}, "cards have the same members"
    load(admin, "org/green", adapters.write("green", "green"))
    assert admin.get("/v1/models/org/green").json()["id"] == "org/green"
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "red"})
    assert error_of(admin.get("/v1/models/red")) == (404, "model", "model_not_found")


def test_the_model_an_adapter_says_it_belongs_to(
    admin: Any, open_service: Service, library: AdapterLibrary, adapters: Any
) -> None:
    open_service.settings = ServerSettings(served_model_names=("a", "b"))
    library.load("x", adapters.write("x", "x"), base_model_name="b").result()
    parents = {card["id"]: card["parent"] for card in admin.get("/v1/models").json()["data"]}
    assert parents == {"a": None, "b": None, "red": "a", "blue": "a", "x": "b"}


# refusals


def test_a_name_that_is_taken(admin: Any, adapters: Any, library: AdapterLibrary) -> None:
    """In vLLM's words."""
    response = load(admin, "red", adapters.write("red", "crimson"))
    assert error_of(response) == (400, "lora_name", "adapter_exists")
    assert response.json()["error"]["message"] == (
        "The lora adapter 'red' has already been loaded. If you want to load the adapter in place, set 'load_inplace'"
        " to True."
    )
    assert generation(library, "red") == 1


@pytest.mark.parametrize("name", ["scripted", "a b", "a:b", "a,b", "", "a\n", "x" * 256])
def test_names_that_no_adapter_may_have(admin: Any, adapters: Any, name: str) -> None:
    response = load(admin, name, adapters.write("green", "green"))
    assert error_of(response)[:2] == (400, "lora_name")


def test_expected_generations(admin: Any, adapters: Any, library: AdapterLibrary) -> None:
    def post(verb: str, **fields: Any) -> httpx.Response:
        response: httpx.Response = admin.post(f"/v1/{verb}_lora_adapter", json={**NAME, **fields})
        return response

    path = adapters.write("red", "crimson")
    for expected in (0, 2):
        for response in (
            post("load", lora_path=path, expected_generation=expected),
            post("load", lora_path=path, expected_generation=expected, load_inplace=True),
            post("unload", expected_generation=expected),
            post("rollback", expected_generation=expected),
        ):
            assert error_of(response) == (409, "expected_generation", "generation_mismatch")
    assert post("load", lora_path=path, expected_generation=1).status_code == 200
    assert generation(library, "red") == 2
    assert post("rollback", expected_generation=2).headers["x-lora-generation"] == "3"
    assert post("unload", expected_generation=3).status_code == 200
    assert post("load", lora_path=path, expected_generation=0).status_code == 200
    assert generation(library, "red") == 4, "numbers are not given twice"


def test_nothing_to_go_back_to(admin: Any) -> None:
    response = admin.post("/v1/rollback_lora_adapter", json=NAME)
    assert error_of(response) == (409, "lora_name", "no_previous_generation")


@pytest.mark.parametrize("verb", ["unload", "rollback"])
def test_unknown_adapters(admin: Any, verb: str) -> None:
    response = admin.post(f"/v1/{verb}_lora_adapter", json={"lora_name": "green"})
    assert error_of(response) == (404, "lora_name", "model_not_found")
    assert "green" in response.json()["error"]["message"]


def test_numbers_must_fit_their_names(admin: Any) -> None:
    response = admin.post("/v1/unload_lora_adapter", json={"lora_name": "blue", "lora_int_id": 0})
    assert error_of(response) == (400, "lora_int_id", None)
    assert (
        admin.post("/v1/unload_lora_adapter", json={"lora_name": "blue", "lora_int_id": 1}).status_code == 200
    )


def test_adapters_that_cannot_be_served(admin: Any, adapters: Any, library: AdapterLibrary) -> None:
    path = adapters.write("red", "bad 8")
    for response in (load(admin, "green", path), load(admin, "red", path, load_inplace=True)):
        assert error_of(response) == (400, "lora_path", "adapter_refused")
        assert "model.layers.0 has another shape (bad 8)" in response.text
    assert [info.name for info in library.list()] == ["red", "blue"]
    assert generation(library, "red") == 1, "a failed load leaves everything as it was"


def test_places_that_are_not_allowed(admin: Any, adapters: Any, tmp_path: Path) -> None:
    outside = adapters.write("../outside", "outside")
    (adapters.root / "link").symlink_to(outside)
    inside = Path(adapters.write("leaky", "x"))
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(Path(outside) / "adapter_model.safetensors")
    texts = set()
    for path in (
        outside,
        str(adapters.root / ".." / "outside"),
        "../outside",
        str(adapters.root / "link"),
        "link",
        "leaky",
        str(tmp_path / "nothing"),
        "/etc",
        "someone/adapter",
        "red\x00",
    ):
        response = load(admin, "green", path)
        assert error_of(response) == (403, "lora_path", "path_not_allowed"), path
        assert response.json()["error"]["type"] == "permission_error"
        texts.add(response.json()["error"]["message"].replace(repr(path), "?"))
    assert len(texts) == 2, (
        "what is there and what is not are told apart by nothing, but for links inside a folder"
    )


def test_places_without_an_adapter(admin: Any, adapters: Any) -> None:
    (adapters.root / "empty").mkdir()
    for path in ("empty", "nothing", str(adapters.root / "nothing")):
        assert error_of(load(admin, "green", path)) == (400, "lora_path", "adapter_refused")


def test_folders_below_a_root_by_their_relative_path(admin: Any, adapters: Any) -> None:
    adapters.write("some/green", "green")
    assert load(admin, "green", "some/green").status_code == 200


def test_without_sources(admin: Any, open_service: Service, adapters: Any) -> None:
    open_service.settings = ServerSettings(allows_keyless_updates=True)
    response = load(admin, "green", adapters.write("green", "green"))
    assert error_of(response) == (403, "lora_path", "path_not_allowed")
    assert "--lora-allowed-roots" in response.text


@pytest.mark.parametrize("verb", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_name": 5}, "lora_name"),
        ({"lora_name": "red", "scale": 1}, "scale"),
        ({"lora_name": "red", "expected_generation": -1}, "expected_generation"),
        ({"lora_name": "red", "expected_generation": "1"}, "expected_generation"),
        ({"lora_path": "x"}, "lora_name"),
    ],
)
def test_bodies(admin: Any, verb: str, fields: dict[str, Any], param: str) -> None:
    beside = {"lora_path": "x"} if verb.startswith("load") else {}
    if param == "lora_name" and verb != PATHS[0]:
        fields = {name: value for name, value in fields.items() if name != "lora_path"}
    response = admin.post(f"/v1/{verb}", json={**beside, **fields})
    assert error_of(response)[:2] == (400, param)


# who may


def test_they_may_be_forbidden(client: Any, library: AdapterLibrary) -> None:
    for path in PATHS:
        response = client.post(f"/v1/{path}", json=NAME)
        assert error_of(response) == (403, None, "updates_not_allowed")
        assert "CADENZA_ALLOW_RUNTIME_LORA_UPDATING" in response.text
        assert "--admin-api-key" in response.text
    assert len(client.get("/v1/lora_adapters").json()["data"]) == 2


@pytest.mark.parametrize("is_allowed_without", [False, True])
@pytest.mark.parametrize("api_keys", [(), ("user",)])
def test_an_admin_key(
    client: Any,
    service: Service,
    library: AdapterLibrary,
    api_keys: tuple[str, ...],
    is_allowed_without: bool,
) -> None:
    service.settings = ServerSettings(
        api_keys=api_keys, admin_api_keys=("admin", "other"), allows_keyless_updates=is_allowed_without
    )
    keyed = type(client)(create_app(service))

    def status(method: str, path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        body = {"json": {"lora_name": "nobody"}} if method == "POST" else {}
        response: httpx.Response = keyed.request(method, path, headers=headers, **body)
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)[2] == "invalid_api_key"
        return response.status_code

    for path in ("/v1/unload_lora_adapter", "/unload_lora_adapter", "/v1/rollback_lora_adapter"):
        assert [status("POST", path, key) for key in (None, "user", "adm", "admin", "other")] == [
            *(401, 401, 401),
            *(404, 404),
        ]
    for path in ("/v1/lora_adapters", "/v1/models"):
        without = 401 if api_keys else 200
        assert [status("GET", path, key) for key in (None, "wrong", "user", "admin")] == [
            *(without, without),
            *(200, 200),
        ]


def test_without_an_admin_key_an_ordinary_one_is_enough(
    client: Any, service: Service, library: AdapterLibrary
) -> None:
    service.settings = ServerSettings(api_keys=("user",), allows_keyless_updates=True)
    keyed = type(client)(create_app(service))
    statuses = [
        keyed.post("/v1/unload_lora_adapter", json=NAME, headers=headers).status_code
        for headers in ({}, {"authorization": "Bearer user"})
    ]
    assert statuses == [401, 200]


def test_a_server_without_adapters(client: Any, open_service: Service) -> None:
    for path in PATHS:
        response = client.post(f"/v1/{path}", json=NAME)
        assert error_of(response) == (400, None, "lora_not_enabled")
        assert "--enable-lora" in response.text
    assert client.get("/v1/lora_adapters").json() == {"object": "list", "data": []}


def test_while_loading_and_draining(admin: Any, open_service: Service) -> None:
    open_service.draining = True
    for path in PATHS:
        assert admin.post(f"/v1/{path}", json=NAME).status_code == 503
    assert admin.get("/v1/lora_adapters").status_code == 503


# numbers


def test_the_metric_that_routers_read(client: Any, library: AdapterLibrary) -> None:
    lines = [line for line in client.get("/metrics").text.splitlines() if "lora_requests_info{" in line]
    assert len(lines) == 1
    labels, _, value = lines[0].rpartition(" ")
    assert labels == (
        'cadenza:lora_requests_info{max_lora="2",running_lora_adapters="a,b",waiting_lora_adapters="c"}'
    )
    assert float(value) > 1_700_000_000


def test_no_such_metric_without_adapters(client: Any) -> None:
    assert "lora_requests_info" not in client.get("/metrics").text
