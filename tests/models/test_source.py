"""What MODEL can be, and the one clear line for everything that it cannot."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from cadenza.models import LoadConfig, ModelError, cached_models, load_model, resolve
from cadenza.models.cache import cache_root
from cadenza.models.source import served_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling_own.py"]
LISTING += ["onnx/config.json", "consolidated.safetensors", "README.md"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a snapshot needs."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if "/gated" in path:
            return self.reply(403, b"", body, {"X-Error-Code": "GatedRepo"})
        if "/missing" in path:
            return self.reply(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        if "no-such-revision" in path:
            return self.reply(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/org/tiny/tree/"):
            files = [
                {"type": "file", "path": name, "size": 2, "oid": f"{i:040}"} for i, name in enumerate(LISTING)
            ]
            return self.reply(200, json.dumps(files).encode(), body, {"Content-Type": "application/json"})
        if path.startswith("/api/models/org/tiny"):
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in LISTING]}
            return self.reply(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
        etag = {"ETag": f'"{abs(hash(path)):040x}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, b"{}", body, etag)

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
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on this machine; yields the cache that it fills."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield hub_cache
    server.shutdown()
    server.server_close()
    thread.join()


def put_into_hub_cache(hub_cache: Path, tiny_folder: Path) -> Path:
    repo = hub_cache / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    return snapshot


def test_a_folder_is_used_as_it_is(tiny_folder: Path) -> None:
    assert resolve(str(tiny_folder)) == tiny_folder
    assert served_name(str(tiny_folder)) == "tiny"


def test_a_relative_and_a_home_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder)
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert resolve(".").samefile(tiny_folder)
    assert resolve("~/tiny").samefile(tiny_folder)
    assert served_name(".") == served_name("~/tiny") == "tiny"


def test_a_gguf_file_is_converted(cache: Path, write_gguf: Callable[..., Path]) -> None:
    folder = resolve(str(write_gguf("My Model.gguf")))
    assert folder.is_relative_to(cache)
    assert served_name(str(write_gguf("My Model.gguf"))) == "My Model"


def test_the_alias_resolves_to_its_conversion(smollm2_path: Path) -> None:
    assert resolve("smollm2") == smollm2_path
    assert served_name("smollm2") == "smollm2"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("./nothing", "no folder"),
        ("/nothing/at/all", "no folder"),
        ("missing.gguf", "no file"),
        ("has space", "no folder"),
    ],
)
def test_what_is_not_there_is_named(spec: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refusal:
        resolve(spec)
    assert spec in str(refusal.value)


def test_a_folder_without_configuration_points_at_its_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json$"):
        resolve(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"serve .*model\.gguf instead"):
        resolve(str(tmp_path))


def test_only_hub_models_have_revisions(tiny_folder: Path) -> None:
    for spec in ("smollm2", str(tiny_folder)):
        with pytest.raises(ModelError, match="no revisions"):
            resolve(spec, revision="main")


def test_a_hub_snapshot_holds_what_is_needed_and_no_more(hub: Path) -> None:
    folder = resolve("org/tiny")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    folder = resolve("org/tiny", trust_remote_code=True)
    assert (folder / "modeling_own.py").is_file()
    assert not (folder / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("spec", "revision", "reason"),
    [
        ("org/missing", None, "not on Hugging Face"),
        ("org/gated", None, "gated.*HF_TOKEN"),
        ("org/tiny", "no-such-revision", "no revision 'no-such-revision'"),
    ],
)
def test_the_hubs_refusals_are_one_line(hub: Path, spec: str, revision: str | None, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refusal:
        resolve(spec, revision=revision)
    assert "\n" not in str(refusal.value)


def test_offline_the_hub_cache_is_enough(
    hub_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = put_into_hub_cache(hub_cache, tiny_folder)
    assert resolve("org/tiny") == snapshot
    assert load_model("org/tiny", LoadConfig(device="cpu")).name == "org/tiny"
    with pytest.raises(ModelError, match=r"org/other is neither .* HF_HUB_OFFLINE"):
        resolve("org/other")


def test_cached_models_lists_both_caches(
    cache: Path, hub_cache: Path, tiny_folder: Path, write_gguf: Callable[..., Path]
) -> None:
    assert cached_models() == []
    folder = resolve(str(write_gguf()))
    snapshot = put_into_hub_cache(hub_cache, tiny_folder)
    (cache / "converted" / "half-done-v1").mkdir()
    found = {model.name: model for model in cached_models()}
    assert found.keys() == {"tiny", "org/tiny"}
    assert found["tiny"].path == folder
    assert found["org/tiny"].path.samefile(snapshot)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "cadenza.json"}
    assert found["tiny"].bytes == sum(sizes.values())


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADENZA_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("CADENZA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "cadenza"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "cadenza"
