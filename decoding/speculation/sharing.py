"""How many tokens each branch may draft, where a step has many of them.

A few more rows are nearly free for a single branch, and expensive among many. Rows go to the drafts most likely to be
accepted, as long as one row more raises the expected number of tokens per time (the goodput of Liu et al. 2024).
Knows numbers only.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cadenza.decoding.speculation.base import Wish

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs, in units of what one row more costs where there are many."""

    least: float
    fixed: float

    def __call__(self, num_rows: int) -> float:
        return max(self.least, self.fixed + num_rows)


CPU_COST = StepCost(8, 2)
"""SmolLM2-135M on one core: 1 to 6 rows took 65 ms, 8 took 78, 16 took 106, 32 took 177, and 1 ms more for each that
is sampled. That would be (12, 6): with it, four and sixteen branches were slower than without drafts, as guesses come
true less often than believed. A wrong draft is lost, one that was not made is not."""
GPU_COST = StepCost(256, 64)
"""Not measured: bound by reading the weights up to some hundred rows."""


def share_rows(
    wishes: Mapping[Key, Wish], num_rows: int, num_tokens: int, step_cost: StepCost
) -> dict[Key, int]:
    """So many drafts for each wish. The step has `num_rows` rows as it is, and brings `num_tokens` tokens."""
    granted: dict[Key, int] = {}
    gain, spent = float(num_tokens), 0.0
    keys = list(wishes)
    # the probability that a draft and all before it are right
    heap = [(-wish.acceptance, number) for number, wish in enumerate(wishes.values()) if wish.num_tokens > 0]
    heapq.heapify(heap)
    while heap:
        negative, number = heap[0]
        key, value = keys[number], -negative
        cost, more = step_cost(num_rows) + spent, step_cost(num_rows + 1) + spent + wishes[key].cost
        if value * cost <= gain * (more - cost):
            break
        num_rows, gain, spent = num_rows + 1, gain + value, spent + wishes[key].cost
        granted[key] = granted.get(key, 0) + 1
        if granted[key] == wishes[key].num_tokens:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-value * wishes[key].acceptance, number))
    return granted
