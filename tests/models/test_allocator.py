"""What was freed goes back to the system, although other things were allocated in between."""

import ctypes
import subprocess
import sys

import pytest

from cadenza.models.allocator import large_blocks_apart

MIB = 2**20
PROGRAM = """
import contextlib, sys
from pathlib import Path
from cadenza.models.allocator import large_blocks_apart

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

bytearray(31 * 2**20)  # freed at once: from now on glibc takes all of this for small
with large_blocks_apart() if sys.argv[1] == "apart" else contextlib.nullcontext():
    before = resident()
    blocks = [(bytearray(b"x") * 2**21, bytearray(b"x") * 2000) for _ in range(60)]
    filled = resident()
    kept = [small for _, small in blocks]
    del blocks
    print(filled - before, resident() - before)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc's heap is looked after"
)


def fill_and_free(how: str) -> tuple[int, int]:
    """Bytes that 60 blocks of 2 MiB with small ones between them take, and that stay when the large ones are freed."""
    command = [sys.executable, "-c", PROGRAM, how]
    filled, left = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(filled), int(left)


def test_large_blocks_go_back_when_they_are_freed() -> None:
    filled, left = fill_and_free("apart")
    assert filled > 100 * MIB
    assert left < 8 * MIB
    assert fill_and_free("together")[1] > 100 * MIB, "otherwise there is nothing to look after"


def test_a_users_own_choice_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setattr(ctypes, "CDLL", None)  # calling it would fail
    with large_blocks_apart():
        pass
