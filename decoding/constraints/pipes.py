"""Pickled messages through a pipe, each with its length before it, read with a deadline.

Both ends are this program: nothing that a caller sent is ever unpickled.
"""

import os
import pickle
import select
import struct
import time
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<Q")


def send(pipe: BinaryIO | Any, value: Any) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


class Reader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def receive(self, timeout: float | None = None) -> tuple[Any, int]:
        """(value, its size in bytes). Raises TimeoutError; EOFError when the other side has gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        size = _LENGTH.unpack(self._read(_LENGTH.size, deadline))[0]
        return pickle.loads(self._read(size, deadline)), size

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._descriptor], [], [], wait)
            if not ready:
                raise TimeoutError
            part = os.read(self._descriptor, min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)
