"""The tokens of a vocabulary as a trie in numpy arrays, and the same trie seen through classes of bytes.

Knows bytes and token ids, nothing of automata.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenTrie:
    """Nodes in breadth-first order; children of one node side by side, in the order of their bytes."""

    parent: NDArray[np.int32]
    """[num_nodes]; the root, 0, is its own."""
    byte: NDArray[np.uint8]
    """[num_nodes] the byte that leads to the node."""
    level_start: NDArray[np.int32]
    """[num_levels + 1] the first node of each depth."""
    token_node: NDArray[np.int32]
    """[num_tokens] where the bytes of each id end; the root for an id without bytes."""

    @classmethod
    def build(cls, tokens: Sequence[bytes]) -> "TokenTrie":
        """Sorted tokens that share a beginning are neighbours, so each depth is one pass over arrays."""
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        text = np.frombuffer(b"".join(tokens[token_id] for token_id in order), np.uint8)
        lengths = np.fromiter((len(tokens[token_id]) for token_id in order), np.int64, len(order))
        offsets = np.cumsum(lengths) - lengths
        node = np.zeros(len(order), np.int32)
        parents, labels, starts = [np.zeros(1, np.int32)], [np.zeros(1, np.uint8)], [0, 1]
        active = np.flatnonzero(lengths)
        depth = 0
        while len(active):
            byte, parent = text[offsets[active] + depth], node[active]
            first = np.ones(len(active), np.bool_)
            first[1:] = (parent[1:] != parent[:-1]) | (byte[1:] != byte[:-1])
            node[active] = starts[-1] - 1 + np.cumsum(first)
            parents.append(parent[first])
            labels.append(byte[first])
            starts.append(starts[-1] + len(parents[-1]))
            depth += 1
            active = active[lengths[active] > depth]
        token_node = np.empty(len(order), np.int32)
        token_node[order] = node
        return cls(np.concatenate(parents), np.concatenate(labels), np.asarray(starts, np.int32), token_node)

    @property
    def num_nodes(self) -> int:
        return len(self.parent)
