"""Which adapters lie in host memory, each content once: bounded, the least recently asked for goes first.

Knows no names, no files and no threads: whoever has it holds a lock.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter


@dataclass(slots=True, eq=False)
class _Content:
    adapter: "Adapter"
    num_users: int = 0


class HostMemory:
    """Never more than `capacity` adapters, and one beside them: that being read, or the last that was published, if all
    others were in use. What is needed no more goes at once, what could be read again goes for want of room."""

    def __init__(self, capacity: int, forget: Callable[[str], None] | None = None) -> None:
        """forget: told the digests of what is neither here nor wanted any more."""
        self.capacity = capacity
        self._forget = forget or (lambda digest: None)
        self._contents: dict[str, _Content] = {}  # by digest, the least recently asked for first
        self._wanted: Collection[str] = frozenset()
        self._pinned: Collection[str] = frozenset()
        self._newest: str | None = None

    def __contains__(self, digest: str) -> bool:
        return digest in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    @property
    def num_staying(self) -> int:
        """Adapters that could not go: in use or pinned."""
        return sum(self._is_staying(digest) for digest in self._contents)

    def add(self, adapter: "Adapter") -> None:
        """To be followed by `trim` or `keep`. Of equal contents the first one stays."""
        if adapter.digest not in self._contents:
            self._contents[adapter.digest] = _Content(adapter)
            self._newest = adapter.digest
        self._touch(adapter.digest)

    def find(self, digest: str) -> "Adapter | None":
        """Asks for nothing: no user, no younger."""
        content = self._contents.get(digest)
        return None if content is None else content.adapter

    def hold(self, digest: str) -> "Adapter":
        self._touch(digest)
        content = self._contents[digest]
        content.num_users += 1
        return content.adapter

    def release(self, digest: str) -> None:
        """Does not count as asking for it: a generation that was replaced is older than the one in its place, however
        long its last request runs."""
        content = self._contents[digest]
        assert content.num_users > 0
        content.num_users -= 1
        if not content.num_users:
            self.trim()

    def keep(self, wanted: Collection[str], pinned: Collection[str]) -> None:
        """wanted: whatever a name stands for, or could be rolled back to; of these, pinned: whatever must stay."""
        elsewhere = set(self._wanted).difference(wanted, self._contents)
        self._wanted, self._pinned = wanted, pinned
        self.trim()
        for digest in elsewhere:
            self._forget(digest)

    def dismiss(self, digest: str) -> None:
        """It was read and warmed; whether it has come to stay is known by now."""
        if digest not in self._contents and digest not in self._wanted:
            self._forget(digest)

    def trim(self) -> None:
        """Let go of what is not wanted, and of what is too much; the newest is not: it has come to be asked for."""
        idle = [digest for digest in self._contents if not self._is_staying(digest)]
        gone = [digest for digest in idle if digest not in self._wanted]
        rest = [digest for digest in idle if digest in self._wanted and digest != self._newest]
        num_beyond = len(self._contents) - len(gone) - self.capacity
        for digest in gone + rest[: max(0, num_beyond)]:
            del self._contents[digest]
        for digest in gone:
            self._forget(digest)

    def num_lacking(self, *, is_request: bool) -> int:
        """How many must go that are in use now before one more is read: what a request asks for must fit into the
        capacity, what is being published may be one too many."""
        beyond = len(self._contents) - self.capacity
        return max(0, beyond, self.num_staying + 1 - self.capacity if is_request else 0)

    def victims(self, number: int, claimed: Collection[str]) -> frozenset[str]:
        """Those in use that should go next, so many if there are; never claimed or pinned ones."""
        found = (
            digest
            for digest, content in self._contents.items()
            if content.num_users and digest not in self._pinned and digest not in claimed
        )
        return frozenset(digest for digest, _ in zip(found, range(number), strict=False))

    def _is_staying(self, digest: str) -> bool:
        return self._contents[digest].num_users > 0 or digest in self._pinned

    def _touch(self, digest: str) -> None:
        self._contents[digest] = self._contents.pop(digest)
