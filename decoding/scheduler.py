"""Which tokens are computed in the next step, and where their keys and values go.

Continuous batching: each step takes, under a budget of tokens, one token of every decoding branch (more after a
run of forced ones), then chunks of prompts in progress, then new branches. When blocks run out, the branch that
comes last in order is preempted: it gives its blocks back, waits, and is recomputed later (vLLM's "recompute",
Kwon et al. 2023). The first branch in order can always take what it needs, so every request comes to its end.

A branch whose tokens are all computed is idle: it keeps its place, as its strategy may be comparing it with branches
that are not as far. An earlier request's branch that finds no place takes that of the last one in order.

Knows branches and block ids; no tensors, no tokens' meaning.
"""

import bisect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cadenza.decoding.adapters.slots import AdapterSlots
from cadenza.decoding.attention import TILE
from cadenza.decoding.block_pool import BlockPool
from cadenza.decoding.branch import Branch

log = logging.getLogger(__name__)
_MAX_OVERTAKEN = 64
"""Branches with other adapters that may pass one which waits for its own: enough that slots are not idle meanwhile,
few enough that it comes to its turn whatever is asked."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start … end-1` of a branch, to be computed in this step."""

    branch: Branch
    start: int
    end: int

    @property
    def reaches_end(self) -> bool:
        """The branch's last token is among them: its logits choose the next one."""
        return self.end == self.branch.num_tokens


@dataclass(slots=True)
class Step:
    spans: list[Span] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) blocks to copy before the forward pass: shared ones about to be written."""
    drafts: dict[Branch, list[int]] = field(default_factory=dict)
    """Guesses of what comes after a branch's last token, to be computed behind it."""

    @property
    def num_rows(self) -> int:
        return sum(span.end - span.start for span in self.spans)


def _chunk_end(branch: Branch, start: int, budget: int) -> int:
    """Up to where the branch's tokens from `start` on can be computed with `budget` of them."""
    end = min(branch.num_tokens, start + budget)
    return end - end % TILE if end < branch.num_prompt_tokens else end


def _order(branch: Branch) -> tuple[int, int, int]:
    return branch.order


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self._pool = pool
        self._adapters = adapters
        self._failed: list[tuple[Branch, Exception]] = []
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._enable_prefix_caching = enable_prefix_caching
        self.waiting: list[Branch] = []  # both sorted by order
        self.running: list[Branch] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, branch: Branch) -> None:
        """Let a new branch wait for its turn."""
        bisect.insort(self.waiting, branch, key=_order)

    def replace(self, retired: Iterable[Branch], forks: Sequence[Branch]) -> None:
        """Let go of branches, and take on forks of theirs or of others, which share their parents' blocks. A fork for
        which there is no seat waits without them."""
        for fork in forks:
            self._pool.share(fork.block_table)
        for branch in retired:
            self.remove(branch)
        for fork in forks:
            self._seat(fork)

    def _seat(self, fork: Branch) -> None:
        is_computed = fork.num_computed > 0  # not so if the parent has lost its blocks in this very step
        if is_computed and len(self.running) == self._max_num_seqs and self.running[-1].order > fork.order:
            self._preempt(self.running[-1])
        if is_computed and len(self.running) < self._max_num_seqs and self._enter(fork):
            bisect.insort(self.running, fork, key=_order)
        else:
            self._release(fork)
            self.add(fork)

    def remove(self, branch: Branch) -> None:
        """Forget a branch, wherever it is, and free its blocks."""
        if branch in self.running:
            self.running.remove(branch)
            self._leave(branch)
        else:
            self.waiting.remove(branch)
        self._release(branch)

    def is_running(self, branch: Branch) -> bool:
        return branch in self.running

    def schedule(self) -> Step:
        while True:
            step = self._schedule()
            if step.spans or not self.running:
                return step
            # all that run are idle, and whom they wait for finds no place: the last gives up its own
            self._preempt(self.running[-1])

    def _schedule(self) -> Step:
        step = Step()
        budget = self._max_num_batched_tokens
        answering = [branch for branch in self.running if branch.num_generated]
        budget -= sum(branch.is_decoding for branch in answering)
        # in order: whom one preempts comes after it, and has no place in the step yet
        for branch in answering:
            if branch not in self.running:
                continue
            if not branch.is_decoding:
                budget -= self._schedule_chunk(branch, budget, step)
            elif self._make_room(branch, branch.num_tokens, step):
                step.spans.append(Span(branch, branch.num_computed, branch.num_tokens))
        for branch in [branch for branch in self.running if not branch.num_generated]:
            budget -= self._schedule_chunk(branch, budget, step)
        first_left: Branch | None = None  # the first that waits for its adapters' turn
        for branch in self.waiting.copy():
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                break
            if first_left is not None and not self._may_overtake(branch, first_left):
                continue
            if not self._enter(branch):
                first_left = first_left or branch
                continue
            if not self._admit(branch, budget):
                self._leave(branch)
                break
            if first_left is not None and branch.adapters is not None:
                first_left.num_overtaken += 1
            budget -= self._schedule_chunk(branch, budget, step)
        return step

    def take_failed(self) -> list[tuple[Branch, Exception]]:
        """Branches whose adapters could not be brought to where they are needed, and why; they still wait."""
        failed, self._failed = self._failed, []
        return failed

    def _enter(self, branch: Branch) -> bool:
        """Hold the branch's adapters on the device, if they are or can be there."""
        if branch.adapters is None or self._adapters is None:
            return True
        try:
            return self._adapters.enter(branch.adapters)
        except Exception as error:
            log.exception("an adapter could not be brought to the device")
            self._failed.append((branch, error))
            return False

    def _leave(self, branch: Branch) -> None:
        if branch.adapters is not None and self._adapters is not None:
            self._adapters.leave(branch.adapters)

    def _may_overtake(self, branch: Branch, first_left: Branch) -> bool:
        """Whether it takes nothing that the other waits for; for how many that holds is bounded, since those whose
        adapters are there keep them there."""
        if branch.adapters is None or self._adapters is None:
            return True
        if any(sibling.request == branch.request for sibling in self.running):
            return True
        return first_left.num_overtaken < _MAX_OVERTAKEN and self._adapters.has(branch.adapters)

    def complete(self, step: Step) -> None:
        """The step's tokens have been computed."""
        for span in step.spans:
            span.branch.num_computed = span.end
            if self._enable_prefix_caching:
                self._publish(span.branch)

    def make_room_for_drafts(self, step: Step, wanted: Mapping[Branch, int]) -> dict[Branch, int]:
        """How many of the drafts wanted behind the last tokens of branches in the step fit: what is scheduled has
        taken its own before, and nobody loses a block. Each of the result must be settled when the step is over."""
        budget = self._max_num_batched_tokens - step.num_rows
        room: dict[Branch, int] = {}
        for branch, count in wanted.items():
            num_free = self._spare(branch, branch.num_tokens + min(count, budget)) - branch.num_tokens
            if granted := min(count, budget, num_free):
                room[branch] = granted
                budget -= granted
        return room

    def settle(self, branch: Branch, num_accepted: int) -> None:
        """So many of a branch's drafts have become its tokens. Blocks that only the others needed go back."""
        if branch not in self.running:
            return
        if num_accepted:
            branch.num_computed = min(branch.num_computed + num_accepted, branch.num_tokens - 1)
        num_needed = -(-branch.num_tokens // self._pool.block_size)
        num_kept = max(num_needed, len(branch.block_table) - branch.num_spare_blocks)
        self._pool.release(branch.block_table[num_kept:])
        del branch.block_table[num_kept:]
        branch.num_spare_blocks = 0

    def _spare(self, branch: Branch, end: int) -> int:
        """Add blocks for tokens up to `end` if they are to be had; returns how many tokens the table then holds."""
        block_size = self._pool.block_size
        fresh = self._pool.allocate(max(0, -(-end // block_size) - len(branch.block_table))) or []
        branch.block_table += fresh
        branch.num_spare_blocks = len(fresh)
        return len(branch.block_table) * block_size

    def _schedule_chunk(self, branch: Branch, budget: int, step: Step) -> int:
        """Schedule as much of the uncomputed tokens as the budget allows; returns how many.

        A prompt is cut at tile boundaries only, so that its keys and values do not depend on where it was cut.
        """
        end = _chunk_end(branch, branch.num_computed, budget)
        if end <= branch.num_computed:
            return 0
        if branch.num_generated and not self._make_room(branch, end, step):  # a run of forced tokens
            return 0
        step.spans.append(Span(branch, branch.num_computed, end))
        return end - branch.num_computed

    def _admit(self, branch: Branch, budget: int) -> bool:
        """Give a waiting branch blocks for all its tokens, known ones first, and let it run; not before the budget
        is enough to begin with it, as by the next step more of its prompt may be known."""
        hits = max(self._cached_blocks(branch), self._sibling_blocks(branch), key=len)
        num_known = len(hits) * self._pool.block_size
        if _chunk_end(branch, num_known, budget) <= num_known:
            return False
        self._pool.share(hits)
        num_needed = -(-branch.num_tokens // self._pool.block_size) - len(hits)
        reserve = self._pool.num_blocks // 100 if self.running else 0  # so that it is not preempted at once
        fresh = None
        if num_needed + reserve <= self._pool.num_available:
            fresh = self._pool.allocate(num_needed)
        if fresh is None:
            self._pool.release(hits)
            return False
        self.prefix_cache_queries += branch.num_tokens
        self.prefix_cache_hits += num_known
        branch.block_table = hits + fresh
        branch.num_computed = num_known
        branch.num_published = min(len(hits), branch.num_prompt_tokens // self._pool.block_size)
        if branch.num_cached_tokens is None:
            branch.num_cached_tokens = branch.num_computed
        self.waiting.remove(branch)
        bisect.insort(self.running, branch, key=_order)
        return True

    def _cached_blocks(self, branch: Branch) -> list[int]:
        """Cached blocks of whole tiles of the prompt, short of its last token where its logits are needed."""
        if not (self._enable_prefix_caching and branch.reads_cache):
            return []
        num_usable = branch.num_prompt_tokens - (branch.num_generated == 0)
        num_blocks = num_usable // TILE * TILE // self._pool.block_size
        hits = self._pool.match(branch.prompt_hashes(num_blocks, self._pool.block_size))
        return hits[: self._num_whole(branch, len(hits))]

    def _sibling_blocks(self, branch: Branch) -> list[int]:
        """Full blocks that running branches of the same request have computed for the same tokens."""
        best: list[int] = []
        if not branch.reads_cache:
            return best
        for sibling in self.running:
            if sibling.request != branch.request:
                continue
            length = min(branch.num_tokens - 1, sibling.num_computed)
            num_equal = next(
                (at for at in range(length) if branch.token_ids[at] != sibling.token_ids[at]), length
            )
            num_blocks = self._num_whole(branch, num_equal // self._pool.block_size)
            best = max(best, sibling.block_table[:num_blocks], key=len)
        return best

    def _num_whole(self, branch: Branch, num_blocks: int) -> int:
        """So many of `num_blocks` leading blocks that the prompt is cut at a tile's boundary, if at all."""
        length = num_blocks * self._pool.block_size
        if length < branch.num_prompt_tokens:
            length -= length % TILE
        return length // self._pool.block_size

    def _make_room(self, branch: Branch, end: int, step: Step) -> bool:
        """Blocks for the branch's tokens up to `end`, its own where it will write; preempts others, or it itself."""
        block_size = self._pool.block_size
        while True:
            first = branch.num_computed // block_size
            shared = first < len(branch.block_table) and self._pool.refs(branch.block_table[first]) > 1
            num_needed = -(-end // block_size) - len(branch.block_table) + shared
            fresh = self._pool.allocate(num_needed)
            if fresh is not None:
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is branch:
                return False
        if shared:
            copy = fresh.pop()
            step.copies.append((branch.block_table[first], copy))
            self._pool.release([branch.block_table[first]])
            branch.block_table[first] = copy
        branch.block_table += fresh
        return True

    def _preempt(self, branch: Branch) -> None:
        self.num_preemptions += 1
        self.running.remove(branch)
        self._leave(branch)
        self._release(branch)
        self.add(branch)

    def _release(self, branch: Branch) -> None:
        self._pool.release(branch.block_table)
        branch.block_table = []
        branch.num_computed = branch.num_published = branch.num_spare_blocks = 0

    def _publish(self, branch: Branch) -> None:
        """Offer computed full blocks of the prompt to other requests.

        Not those of generated tokens: computed as decode rows they differ in the last bit from what a prompt
        of the same tokens would compute, and a cache must not change a result.
        """
        block_size = self._pool.block_size
        num_full = min(branch.num_computed, branch.num_prompt_tokens) // block_size
        hashes = branch.prompt_hashes(num_full, block_size)
        for number in range(branch.num_published, num_full):
            self._pool.publish(branch.block_table[number], hashes[number])
        branch.num_published = max(branch.num_published, num_full)
