"""Which adapters lie where the device computes with them: a fixed number of slots, given away by least recent use.

A slot is held as long as a branch in the batch uses its adapter. Knows digests and counts; what is in a slot is for
`put` and `clear` to say. Adapters themselves are not kept: host memory has a bound of its own.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable

from cadenza.decoding.adapters.set import AdapterSet
from cadenza.models.adapters.adapter import Adapter


class AdapterSlots:
    """On the engine's thread only."""

    def __init__(
        self, num_slots: int, put: Callable[[int, Adapter], None], clear: Callable[[int], None]
    ) -> None:
        self.num_slots = num_slots
        self._put, self._clear = put, clear
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # by digest, least recently used first
        self._users: Counter[str] = Counter()

    def slot_of(self, adapter: Adapter) -> int:
        """Of an adapter that is held."""
        return self._slots[adapter.digest]

    def enter(self, adapters: AdapterSet) -> bool:
        """Hold a slot for each adapter of the set; False, and nothing changes, where there are not enough."""
        wanted = {term.adapter.digest: term.adapter for term in adapters.terms}
        missing = [digest for digest in wanted if digest not in self._slots]
        idle = [digest for digest in self._slots if not self._users[digest] and digest not in wanted]
        if len(missing) > len(self._free) + len(idle):
            return False
        for digest in idle[: max(0, len(missing) - len(self._free))]:
            self._evict(digest)
        for digest in missing:
            slot = self._free.pop()
            try:
                self._put(slot, wanted[digest])
            except BaseException:
                self._clear(slot)  # it may be there in part
                self._free.append(slot)
                raise
            self._slots[digest] = slot
        for digest in wanted:
            self._users[digest] += 1
            self._slots.move_to_end(digest)
        return True

    def has(self, adapters: AdapterSet) -> bool:
        """Whether all of the set are there already."""
        return all(term.adapter.digest in self._slots for term in adapters.terms)

    def leave(self, adapters: AdapterSet) -> None:
        for term in adapters.terms:
            self._users[term.adapter.digest] -= 1

    def forget(self, digest: str) -> None:
        """Empty the adapter's slot, unless it is in use or there is none."""
        if digest in self._slots and not self._users[digest]:
            self._evict(digest)

    def _evict(self, digest: str) -> None:
        slot = self._slots.pop(digest)
        del self._users[digest]
        self._clear(slot)
        self._free.append(slot)
