"""How many tokens each branch may draft, where a step has many of them.

A step costs about as much as `fixed_rows` rows, and then as much again for each row: a few more rows are nearly free
for a single branch, and expensive among many. Rows go to the drafts most likely to be accepted, as long as one row
more raises the expected number of tokens per time (the goodput of Liu et al. 2024). Knows numbers only.
"""

import heapq
from collections.abc import Mapping
from typing import TypeVar

from cadenza.decoding.speculation.base import Wish

CPU_FIXED_ROWS, GPU_FIXED_ROWS = 12, 256
"""A CPU: one row of a model of 135M parameters took 50 ms, 8 took 61, 16 took 87 and 32 took 164."""

Key = TypeVar("Key")


def share_rows(wishes: Mapping[Key, Wish], num_rows: int, num_tokens: int, fixed_rows: int) -> dict[Key, int]:
    """So many drafts for each wish. The step has `num_rows` rows as it is, and brings `num_tokens` tokens."""
    granted: dict[Key, int] = {}
    cost, gain = float(fixed_rows + num_rows), float(num_tokens)
    keys = list(wishes)
    # the probability that a draft and all before it are right
    heap = [(-wish.acceptance, number) for number, wish in enumerate(wishes.values()) if wish.num_tokens > 0]
    heapq.heapify(heap)
    while heap:
        negative, number = heap[0]
        key, value = keys[number], -negative
        if value * cost <= gain:
            break
        cost, gain = cost + 1, gain + value
        granted[key] = granted.get(key, 0) + 1
        if granted[key] == wishes[key].num_tokens:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-value * wishes[key].acceptance, number))
    return granted
