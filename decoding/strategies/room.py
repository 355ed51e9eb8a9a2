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

    def check(self, param: str, num_branches: int, num_shared: int, num_own: int) -> None:
        """Raises RequestError, naming the field that asked for so many branches, where they do not fit: each has
        `num_own` tokens of its own behind `num_shared` that are stored once, as far as whole tiles go."""
        num_shared_blocks = num_shared // TILE * TILE // self.block_size
        num_own_blocks = -(-(num_shared + num_own) // self.block_size) - num_shared_blocks
        reserve = (
            self.num_kv_tokens // self.block_size // 100
        )  # what the scheduler keeps back for those that run
        needed = (num_shared_blocks + num_branches * num_own_blocks + reserve) * self.block_size
        if needed > self.num_kv_tokens:
            raise RequestError(
                f"{param} is {num_branches}: so many branches of up to {num_shared + num_own} tokens need a KV cache"
                f" of {needed} tokens, and it holds {self.num_kv_tokens}; lower {param} or max_tokens",
                param,
            )
