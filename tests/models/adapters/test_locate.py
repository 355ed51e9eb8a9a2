"""Where adapters may come from: below the roots or from the allow list, by no way around, and said in one line."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from cadenza.models import ModelError
from cadenza.models.adapters.locate import AdapterPathError, AdapterSources, locate_trusted

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"]
UNWANTED = ["adapter_model.bin", "README.md", "own.py", "optimizer.pt", "checkpoint-5/adapter_config.json"]


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or WANTED[:2]:
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With the adapter `bots/a` below, and `outside` beside."""
    make(tmp_path / "outside")
    make(tmp_path / "root" / "bots" / "a")
    return tmp_path / "root"


def test_below_a_root_by_any_name_for_it(root: Path, tmp_path: Path) -> None:
    real = (root / "bots" / "a").resolve()
    (tmp_path / "linked").symlink_to(root)
    (root / "short").symlink_to(root / "bots" / "a")
    roots = (make(tmp_path / "other"), root)
    for spec in (
        str(root / "bots/a"),
        "bots/a",
        "./bots/../bots/a/",
        str(tmp_path / "linked/bots/a"),
        "short",
    ):
        assert AdapterSources(roots).locate(spec) == real
    assert AdapterSources((tmp_path / "linked",)).locate(str(root / "bots/a")) == real
    assert AdapterSources((root / "bots" / "a",)).locate(str(root / "bots/a")) == real


def test_everywhere_else_is_refused_whatever_is_there(root: Path, tmp_path: Path) -> None:
    """The line is the same whether it exists or not: nobody can look around."""
    (root / "way-out").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    outside = [
        str(tmp_path / "outside"),
        str(tmp_path / "nothing"),
        "../outside",
        "../nothing",
        "bots/a/../../../outside",
        "way-out",
        "way-out/../nothing",
        str(root / "way-out"),
        "/etc/passwd",
        str(root) + "side",
        "",
        "a\0b",
        "loop",
        "org/name",
    ]
    for spec in outside:
        with pytest.raises(AdapterPathError) as refusal:
            AdapterSources((root,)).locate(spec)
        expected = f"{spec!r} is neither a folder below those that adapters may be loaded from (--lora-allowed-roots)"
        assert str(refusal.value).startswith(expected)
        assert str(root) not in str(refusal.value).replace(repr(spec), "")


def test_links_within_a_folder_must_not_lead_out_of_the_root(root: Path, tmp_path: Path) -> None:
    sources = AdapterSources((root,))
    blob = root / "blob"
    blob.write_bytes(b"{}")
    linked = make(root / "linked", "adapter_config.json")
    (linked / "adapter_model.safetensors").symlink_to(blob)  # as in the hub's cache
    assert sources.locate("linked") == linked.resolve()
    for name in ("tokenizer.json", "additional_chat_templates/tool.jinja", "additional_chat_templates"):
        folder = make(root / f"bad-{len(name)}")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "outside")
        with pytest.raises(
            AdapterPathError, match="is a link that leads to where adapters may not be loaded from"
        ):
            sources.locate(folder.name)


def test_a_folder_that_holds_no_adapter_is_named(root: Path) -> None:
    sources = AdapterSources((root,))
    make(root / "model", "config.json")
    make(root / "unfinished", "adapter_config.json")
    make(root / "pickle", "adapter_config.json", "adapter_model.bin")
    os.mkfifo(make(root / "pipe") / "tokenizer.json")
    (make(root / "broken") / "tokenizer.json").symlink_to(root / "nothing")
    refusals = {
        "model": "'model' holds no adapter_config.json, so it is not an adapter that PEFT has saved",
        "unfinished": "'unfinished' holds no adapter_model.safetensors; only safetensors are read",
        "pickle": (
            "'pickle' holds adapter_model.bin, which is a pickle, and no adapter_model.safetensors; only safetensors "
            "are read"
        ),
        "pipe": "'tokenizer.json' in 'pipe' is neither a file nor a folder",
        "broken": "'tokenizer.json' in 'broken' is neither a file nor a folder",
        "no such": "there is no folder 'no such'",
        "x" * 300: f"there is no folder {'x' * 300!r}",
    }
    for spec, reason in refusals.items():
        with pytest.raises(ModelError) as refusal:
            sources.locate(spec)
        assert not isinstance(refusal.value, AdapterPathError)
        assert str(refusal.value) == reason


def test_nothing_is_allowed_where_nothing_was_said(root: Path) -> None:
    for spec in (str(root / "bots/a"), "org/name", "."):
        with pytest.raises(AdapterPathError, match="no place is allowed to load adapters from"):
            AdapterSources().locate(spec)


@pytest.mark.parametrize(
    "allowed", ["*", "*/*", "name", "org/", "org/na*", "../x", "org/name/more", "", "org/.."]
)
def test_an_allow_list_says_ids_or_organisations(allowed: str) -> None:
    with pytest.raises(ModelError, match=r"write org/name, or org/\*"):
        AdapterSources((), (allowed,))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a snapshot needs: org/bot, own/bot, and org/empty."""

    requested: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requested.append(path)
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = {"org/bot": WANTED + UNWANTED, "own/bot": WANTED, "org/empty": UNWANTED}.get(repo)
        if files is None:
            return self.reply(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            content = [
                {"type": "file", "path": name, "size": 2, "oid": f"{i:040}"} for i, name in enumerate(files)
            ]
            return self.reply(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})
        if path.startswith("/api/"):
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.reply(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
        return self.reply(
            200, b"{}", body, {"ETag": f'"{path.encode().hex():0>40}"', "X-Repo-Commit": COMMIT}
        )

    def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine; yields the paths that it was asked for."""
    paths: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Noting", (Hub,), {"requested": paths}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield paths
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_allowed_id_is_fetched_without_what_no_adapter_needs(requested: list[str]) -> None:
    for hub_ids in (("org/bot",), ("some/other", "org/*")):
        folder = AdapterSources((), hub_ids).locate("org/bot")
        assert sorted(path.name for path in folder.iterdir()) == sorted(WANTED)
    assert not any(name in path for path in requested for name in UNWANTED)


def test_the_hub_is_not_asked_for_what_is_not_allowed(requested: list[str], root: Path) -> None:
    sources = AdapterSources((root,), ("org/other", "own/*"))
    for spec in (
        "org/bot",
        "own/../org/bot",
        "own/bot/..",
        "own/bot/more",
        "ownx/bot",
        "own",
        "https://own/bot",
    ):
        with pytest.raises(ModelError):
            sources.locate(spec)
    assert requested == []
    assert sources.locate("own/bot").name == COMMIT


def test_a_folder_below_a_root_wins_over_an_id(requested: list[str], root: Path) -> None:
    folder = make(root / "org" / "bot")
    assert AdapterSources((root,), ("org/bot",)).locate("org/bot") == folder.resolve()
    assert requested == []


def test_what_the_hub_lacks_is_one_line(requested: list[str]) -> None:
    sources = AdapterSources((), ("org/*",))
    with pytest.raises(ModelError, match=r"org/missing is not .* on Hugging Face"):
        sources.locate("org/missing")
    with pytest.raises(ModelError, match=r"'org/empty' holds no adapter_config.json"):
        sources.locate("org/empty")


def test_the_operator_may_name_anything(
    requested: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = (root / "bots" / "a").resolve()
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    (tmp_path / "linked").symlink_to(real)
    for spec in (
        str(real),
        "bots/a",
        "./bots/a",
        "~/bots/a",
        str(tmp_path / "linked"),
        "../outside/../root/bots/a",
    ):
        assert locate_trusted(spec) == real
    assert sorted(path.name for path in locate_trusted("org/bot").iterdir()) == sorted(WANTED)
    for spec in ("./nothing", "nothing", "/nothing/at/all", "has space/bot"):
        with pytest.raises(ModelError, match=f"there is no folder '{spec}'"):
            locate_trusted(spec)
    make(root / "model", "config.json")
    with pytest.raises(ModelError, match="'model' holds no adapter_config"):
        locate_trusted("model")
