"""Packed masks that were needed before, least recently used first to go."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

_MAX_BYTES = 64 * 1024 * 1024


class MaskCache:
    """Safe to use from any thread. Two threads may make the same mask at once; that is cheaper than waiting."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._masks: OrderedDict[Hashable, NDArray[np.int32]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], NDArray[np.int32]]) -> NDArray[np.int32]:
        with self._lock:
            known = self._masks.get(key)
            if known is not None:
                self._masks.move_to_end(key)
                return known
        mask = make()
        with self._lock:
            if key not in self._masks:
                self._masks[key] = mask
                self._num_bytes += mask.nbytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._masks.popitem(last=False)[1].nbytes
        return mask

    def __len__(self) -> int:
        return len(self._masks)
