"""What was freed goes back to the system, although other things were allocated in between."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cadenza.models.allocator import large_blocks_apart

MIB = 2**20

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc's heap is looked after"
)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fill_and_free() -> int:
    """Bytes that stay after 60 blocks of 2 MiB, with small ones between them, were freed; before any trimming."""
    before = resident()
    blocks = [
        (torch.ones(2 * MIB, dtype=torch.uint8), torch.ones(2000, dtype=torch.uint8)) for _ in range(60)
    ]
    filled = resident()
    assert filled - before > 100 * MIB
    kept = [small for _, small in blocks]
    del blocks
    stays = resident() - before
    assert len(kept) == 60
    return stays


def test_large_blocks_go_back_when_they_are_freed() -> None:
    torch.ones(31 * MIB, dtype=torch.uint8)  # freed at once: from now on glibc takes all of this for small
    with large_blocks_apart():
        assert fill_and_free() < 8 * MIB


def test_a_users_own_choice_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    library: Callable[..., object] = lambda *_: called.append("loaded")  # noqa: E731
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setattr(ctypes, "CDLL", library)
    with large_blocks_apart():
        pass
    assert called == []
