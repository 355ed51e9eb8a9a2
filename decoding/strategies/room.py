"""Whether the KV cache can hold all branches of a search at once: they are compared, so none can wait for another.

Knows numbers only.
"""

from dataclasses import dataclass

from cadenza.decoding.attention import TILE
from cadenza.decoding.request import RequestError


@dataclass(frozen=True, slots=True)
class Room:
    num_kv_tokens: int
    block_size: int

    def longest(self, num_branches: int, num_shared: int) -> int:
        """How many tokens of its own each branch may have behind `num_shared` that are stored once, as far as whole
        tiles go; 0 or less: none."""
        num_blocks = self.num_kv_tokens // self.block_size
        num_blocks -= num_blocks // 100  # what the scheduler keeps back for those that run
        num_shared_blocks = num_shared // TILE * TILE // self.block_size
        num_own_blocks = (num_blocks - num_shared_blocks) // num_branches
        return (num_shared_blocks + num_own_blocks) * self.block_size - num_shared

    def check(self, param: str, num_branches: int, num_shared: int, num_own: int) -> None:
        """Raises RequestError, naming the field that asked for so many branches, where they do not fit."""
        longest = self.longest(num_branches, num_shared)
        if num_own > longest:
            raise RequestError(
                f"{param} is {num_branches}: the KV cache of {self.num_kv_tokens} tokens has room for so many branches"
                f" with {max(longest, 0)} tokens each behind {num_shared} shared ones, and {num_own} are asked for;"
                f" lower {param} or max_tokens",
                param,
            )
