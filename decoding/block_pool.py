"""Blocks of KV cache: who holds which, and which of them a later prompt may reuse.

Only counts and hashes live here; the tensors that the block ids index belong to the model runner.
A block is in one of three states:

    held       reference count > 0; at least one branch's block table points at it
    cached     reference count 0, but its content is known by a hash: reusable, and evictable oldest first
    free       reference count 0, no known content

Sharing full blocks by a chained content hash is the prefix cache of vLLM (Kwon et al. 2023).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block: its own tokens and, through `parent`, everything before them.

    The first block's parent is `prefix_root`, so equal tokens under another adapter or salt never collide.
    """
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=32).digest()


def prefix_root(adapter_hash: str = "", cache_salt: str = "") -> bytes:
    """The parent of a prompt's first block: what, beside the tokens, decides the content of its KV cache."""
    return hashlib.blake2b(
        f"{len(adapter_hash)}:{adapter_hash}{cache_salt}".encode(), digest_size=32
    ).digest()


class BlockPool:
    """Reference-counted block ids `0 … num_blocks-1`, with a content-addressed cache of the idle ones."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks, least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: the free ones and the cached ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that some branch points at."""
        return self.num_blocks - self.num_available

    def refs(self, block: int) -> int:
        return self._refs[block]

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) if so many are not available."""
        if count > self.num_available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            self._hash_of[block] = None
            del self._block_of[digest]

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of `blocks`; a cached one becomes held again."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each of `blocks`.

        Released last block first: a prefix is only reachable through its first blocks, so the tail is evicted
        before the head.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable by its content hash. First come, first kept."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The longest run of blocks, from the start, whose content is cached. Takes no reference."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def reset_cache(self) -> None:
        """Forget the content of every idle block; held blocks keep theirs until they are released."""
        for block in list(self._idle):
            self._forget(block)
            self._free.append(block)
        self._idle.clear()
