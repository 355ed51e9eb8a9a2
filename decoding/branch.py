"""A branch: one line of tokens growing from a request's prompt, and the KV cache blocks that hold it.

Facts are stored, conclusions are properties. A branch knows nothing of tensors, threads or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cadenza.decoding.block_pool import hash_block
from cadenza.decoding.detokenizer import TextStream
from cadenza.decoding.request import Delta, FinishReason

if TYPE_CHECKING:
    from cadenza.decoding.adapters.set import AdapterSet
    from cadenza.decoding.constraints.matcher import Matcher


@dataclass(slots=True, eq=False)
class Branch:
    order: tuple[int, int, int]
    """(priority, arrival of the request, number): who goes first, and who is preempted last."""
    index: int
    """Which of the request's samples; also the `branch` of its random numbers."""
    num_prompt_tokens: int
    token_ids: list[int]
    """Prompt and generated tokens."""
    text: TextStream
    cache_root: bytes
    """What the prompt's block hashes start from: adapter and cache salt."""
    adapters: "AdapterSet | None" = None
    """What it is computed with."""
    num_overtaken: int = 0
    """Branches that were let in while it waited for its adapters' turn."""
    reads_cache: bool = True
    """False where every prompt token must be computed, for its log-probabilities."""
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    num_spare_blocks: int = 0
    """At the table's end, for drafts of the step that is running; no fork gets them."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of the prompt, as far as they were needed."""
    num_published: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens that the prefix cache supplied when the branch was first admitted."""
    matcher: "Matcher | None" = None
    """Follows the tokens where the request has a constraint."""
    pending: list[int] = field(default_factory=list)
    """Tokens that the matcher is past already: the constraint's, to come one in a step for their log-probability."""
    unsent: list[Delta] = field(default_factory=list)
    """News that the strategy has not let go yet."""
    cumulative_logprob: float = 0.0
    """Of the generated tokens, where the strategy needs scores or the client wants them."""
    mirostat_mu: float | None = None
    """Mirostat's state, once a token has been drawn with it: what the next draw may surprise by, in bits."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the token that was generated last is missing from the cache."""
        return self.num_generated > 0 and self.num_uncomputed == 1

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def prompt_hashes(self, count: int, block_size: int) -> Sequence[bytes]:
        """The hashes of the prompt's first `count` full blocks."""
        while len(self.block_hashes) < count:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else self.cache_root
            self.block_hashes.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return self.block_hashes[:count]

    @property
    def request(self) -> tuple[int, int]:
        """Equal for the branches of one request."""
        return self.order[:2]

    def fork(self, number: int, index: int) -> "Branch":
        """A copy that shares the blocks; whoever calls adds the references."""
        return replace(
            self,
            order=(*self.order[:2], number),
            index=index,
            token_ids=self.token_ids.copy(),
            text=self.text.fork(),
            block_table=self.block_table[: len(self.block_table) - self.num_spare_blocks],
            num_spare_blocks=0,
            block_hashes=self.block_hashes.copy(),
            matcher=None if self.matcher is None else self.matcher.fork(),
            pending=self.pending.copy(),
            unsent=self.unsent.copy(),
        )
