"""Folders that live as long as the process that fills them; those of killed processes go with the next start.

Knows nothing of what is put there.
"""

import shutil
import tempfile
from pathlib import Path
from weakref import finalize

from filelock import FileLock, Timeout

from cadenza.models.cache import cache_root, exclusive
from cadenza.models.errors import ModelError

_PREFIX, _LOCK = "cadenza-offload-", "lock"


class Scratch:
    """An empty folder of its own in `parent`, by default in the cache."""

    def __init__(self, parent: Path | None) -> None:
        """Raises `ModelError` where nothing can be written."""
        parent = cache_root() / "offload" if parent is None else parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with exclusive("offload"):
                for folder in parent.glob(f"{_PREFIX}*"):
                    _remove_if_left(folder)
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                self._lock = _lock(self.path)
                self._lock.acquire(timeout=0)
        except OSError as error:
            raise ModelError(f"the offload folder {parent} cannot be written: {error.strerror}") from error

    def keep_for(self, owner: object) -> None:
        """The folder goes when `owner` does, or at exit."""
        finalize(owner, _remove, self.path, self._lock)

    def remove(self) -> None:
        _remove(self.path, self._lock)


def _lock(folder: Path) -> FileLock:
    """Held by who uses the folder; the operating system frees it when the process ends, however it ends."""
    return FileLock(folder / _LOCK, thread_local=False)


def _remove(folder: Path, held: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    held.release(force=True)


def _remove_if_left(folder: Path) -> None:
    held = _lock(folder)
    try:
        held.acquire(timeout=0)
    except (Timeout, OSError):
        return
    _remove(folder, held)
