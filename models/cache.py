"""Where fetched and converted models are kept, and how several processes share that place safely.

A folder counts as complete only through its manifest: it is built under a temporary name and renamed when
whole, so what a killed process leaves behind is never read. Knows nothing of GGUF, wheels or Hugging Face.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cadenza.models.errors import ModelError

MANIFEST = "cadenza.json"
_UNFINISHED = ".tmp-"

log = logging.getLogger(__name__)


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
    """SHA-256 of the file, computed again only when its size or a time has changed: big files take a while."""
    *known, digest = _known_digests().get(str(file.absolute()), [""])
    if known != _identity(file):
        digest = sha256_of(file)
        _remember(file, digest)
    return str(digest)


def _identity(file: Path) -> list[int]:
    """The second time is that of any change, which nobody can set."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _remember(file: Path, digest: str) -> None:
    """Spares others the reading; where the cache cannot be written, they read."""
    note = {str(file.absolute()): [*_identity(file), digest]}
    with suppress(ModelError), exclusive("digests"):
        known = {path: facts for path, facts in _known_digests().items() if Path(path).exists()}
        _replace_text(cache_root() / "digests.json", json.dumps(known | note, indent=1))


def _known_digests() -> dict[str, list[Any]]:
    """[size, times, SHA-256] of files by their path."""
    try:
        known = json.loads((cache_root() / "digests.json").read_text(encoding="utf-8"))
        return {path: facts for path, facts in known.items() if isinstance(facts, list) and facts}
    except (OSError, ValueError, AttributeError):
        return {}


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


def is_intact(folder: Path) -> bool:
    """Whether the folder is complete and holds the very bytes that were published; says so where it does not.

    Quick as long as nobody has touched the files since.
    """
    if not is_complete(folder):
        return False
    digests = (read_manifest(folder) or {}).get("sha256", {})
    with suppress(OSError):
        if digests and all(remembered_digest(folder / name) == digest for name, digest in digests.items()):
            return True
    log.warning("%s is damaged, and is not used", folder)
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

    The caller holds the lock of `target`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for remains in unfinished(target.parent):
            _remove_remains(remains, target.name)
        building = target.parent / f".{target.name}{_UNFINISHED}{os.getpid()}"
        building.mkdir()
        try:
            build(building)
            facts = facts | _contents(building)
            (building / MANIFEST).write_text(json.dumps(facts, indent=2), encoding="utf-8")
            _flush(building)
            if target.exists():
                shutil.rmtree(target)
            os.replace(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        for name, digest in facts["sha256"].items():
            _remember(target / name, digest)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}{_space(target)}") from error


def unfinished(parent: Path) -> list[Path]:
    """Folders that are being built, or were when their process was killed."""
    return sorted(parent.glob(f".*{_UNFINISHED}*"))


def _remove_remains(folder: Path, held: str) -> None:
    """held: the lock that we have; a folder whose lock another process has is being built."""
    name = folder.name[1:].rpartition(_UNFINISHED)[0]
    lock = FileLock(cache_root() / "locks" / f"{name}.lock")
    try:
        if name != held:
            lock.acquire(timeout=0)
        shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        pass
    finally:
        lock.release()


def _contents(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file."""
    files = sorted(folder.iterdir())
    return {
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: sha256_of(file) for file in files},
    }


def _space(target: Path) -> str:
    try:
        return f"; {shutil.disk_usage(target.parent).free / 1e9:.2f} GB are free there"
    except OSError:
        return ""


def _flush(folder: Path) -> None:
    """On disk before the folder gets its name, so that not even a power cut leaves a trusted name and lost bytes."""
    for entry in folder.iterdir():
        with entry.open("rb") as file:
            os.fsync(file.fileno())
