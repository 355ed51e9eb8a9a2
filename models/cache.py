"""Where fetched and converted models are kept, and how several processes share that place safely.

A folder counts as complete only through its manifest: it is built under a temporary name and renamed when
whole, so what a killed process leaves behind is never read. Knows nothing of GGUF, wheels or Hugging Face.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cadenza.models.errors import ModelError

MANIFEST = "cadenza.json"


def cache_root() -> Path:
    """`CADENZA_CACHE`, else `cadenza` under the XDG cache folder."""
    if chosen := os.environ.get("CADENZA_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "cadenza"


def say(line: str) -> None:
    """One line of progress for a person at a terminal; nothing when the output is a log or a pipe."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Only one process at a time does the work called `name` in this cache; the others wait here.

    The operating system frees the lock of a process that dies.
    """
    folder = cache_root() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Waiting for another process that prepares {name} …")
            lock.acquire()
    except OSError as error:
        raise ModelError(f"the model cache {cache_root()} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_digest(file: Path) -> str:
    """SHA-256 of the file, computed again only when its size or time has changed: big files take a while."""
    stat = file.stat()
    key = f"{file.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
    notes = cache_root() / "digests.json"
    with exclusive("digests"):
        known = _known_digests(notes)
    if key not in known:
        digest = sha256_of(file)  # outside the lock: other files must not wait for this one
        with exclusive("digests"):
            known = _known_digests(notes) | {key: digest}
            _replace_text(notes, json.dumps(known, indent=1))
    return known[key]


def _known_digests(notes: Path) -> dict[str, str]:
    try:
        known = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _replace_text(file: Path, text: str) -> None:
    """A reader finds the old text or the new one, whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise ModelError(f"cannot write {file}: {error.strerror or error}") from error


def is_complete(folder: Path) -> bool:
    """Whether every file that the folder's manifest names is there in its full length."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except OSError:
        return False


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def build_folder(target: Path, facts: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Let `build` fill a temporary folder, then publish it as `target` in one step.

    The caller holds the lock of `target`, so whatever temporary folders lie beside it are remains.
    """
    prefix = f".{target.name}.tmp-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for remains in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(remains, ignore_errors=True)
        building = target.parent / f"{prefix}{os.getpid()}"
        building.mkdir()
        try:
            build(building)
            files = {entry.name: entry.stat().st_size for entry in building.iterdir()}
            (building / MANIFEST).write_text(json.dumps(facts | {"files": files}, indent=2), encoding="utf-8")
            _flush(building)
            if target.exists():
                shutil.rmtree(target)
            os.replace(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error


def _flush(folder: Path) -> None:
    """On disk before the folder gets its name, so that not even a power cut leaves a trusted name and lost bytes."""
    for entry in folder.iterdir():
        with entry.open("rb") as file:
            os.fsync(file.fileno())
