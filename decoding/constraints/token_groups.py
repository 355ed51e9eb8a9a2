"""Tokens through the eyes of one automaton: those whose bytes fall into the same classes are one group.

All tokens of a group lead to the same states everywhere, so that work is done per group instead of per token: for
`[a-z]+` a vocabulary of 49,152 has some twenty. Knows classes and transition tables, not what they stand for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.token_trie import TokenTrie

_MAX_PAIRS = 1 << 18
"""Pairs of a state and a node that are followed at once; bounds the memory of a walk."""
_PAIRS_PER_STEP = 32
"""Pairs followed in the time of one unit of effort, about."""

Ints: TypeAlias = NDArray[np.int32] | NDArray[np.int64]
Edges: TypeAlias = tuple[Ints, Ints, Ints]
"""Where from, by which group, where to."""


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """A trie over classes of bytes, breadth first, children side by side. A group is a node where tokens end."""

    label: NDArray[np.int64]
    """[num_nodes] the class that leads to the node."""
    first_child: NDArray[np.int64]
    """[num_nodes + 1] the children of node n are first_child[n] .. first_child[n + 1]."""
    is_group: NDArray[np.bool_]
    """[num_nodes]."""
    of_token: NDArray[np.int32]
    """[num_tokens] the group of each id; 0, the root, for those that are never possible."""

    @classmethod
    def build(
        cls, trie: TokenTrie, byte_class: NDArray[np.uint8], class_is_live: NDArray[np.bool_]
    ) -> "TokenGroups":
        """Merge the nodes of the trie of bytes that the same classes lead to, depth by depth."""
        num_classes = len(class_is_live)
        merged = np.full(trie.num_nodes, -1, np.int32)
        merged[0] = 0
        parents, labels, count = [np.full(1, -1, np.int64)], [np.zeros(1, np.int64)], 1
        for start, end in pairwise(trie.level_start[1:].tolist()):
            above = merged[trie.parent[start:end]].astype(np.int64)
            label = byte_class[trie.byte[start:end]]
            kept = np.flatnonzero((above >= 0) & class_is_live[label])
            if not len(kept):
                break
            keys, place = np.unique(above[kept] * num_classes + label[kept], return_inverse=True)
            merged[start + kept] = count + place
            parents.append(keys // num_classes)
            labels.append(keys % num_classes)
            count += len(keys)
        of_token = np.maximum(merged[trie.token_node], 0)
        is_group = np.zeros(count, np.bool_)
        is_group[of_token] = True
        is_group[0] = False
        first_child = np.searchsorted(np.concatenate(parents), np.arange(count + 1))
        return cls(np.concatenate(labels), first_child, is_group, of_token)

    @property
    def num_nodes(self) -> int:
        return len(self.label)

    def walk(
        self, table: NDArray[np.int32], states: Ints, spend: Callable[[int], None] | None = None
    ) -> Iterator[Edges]:
        """The edges of the automaton over tokens that leave these states, in blocks.

        table: [num_states, num_classes] the automaton over bytes, -1 where there is no transition.
        """
        flat, num_classes = table.ravel(), table.shape[1]
        pending: list[Edges] = [(states, np.zeros(len(states), np.int64), states)]
        while pending:
            origin, node, state = pending.pop()
            first = self.first_child[node]
            count = self.first_child[node + 1] - first
            total = int(count.sum())
            if total > _MAX_PAIRS and len(origin) > 1:
                half = len(origin) // 2
                pending += [
                    (origin[half:], node[half:], state[half:]),
                    (origin[:half], node[:half], state[:half]),
                ]
                continue
            if spend is not None:
                spend(1 + total // _PAIRS_PER_STEP)
            pair = np.repeat(np.arange(len(origin)), count)
            child = np.arange(total) + np.repeat(first - (np.cumsum(count) - count), count)
            following = flat[state[pair] * num_classes + self.label[child]]
            live = np.flatnonzero(following >= 0)
            origin, node, state = origin[pair[live]], child[live], following[live]
            ends = self.is_group[node]
            if ends.any():
                yield origin[ends], node[ends], state[ends]
            if len(node):
                pending.append((origin, node, state))
