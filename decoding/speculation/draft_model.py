"""Drafts by a smaller model of the same vocabulary (Leviathan et al. 2023), coupled by its noise.

It has a KV cache of its own under the same block ids as the model it drafts for: every prompt that the one computes
the other computes too, so that cached and shared blocks hold both. A branch's answer is caught up on when it is to be
drafted for. Tokens are drawn with the noise of the very positions that they are for (Gumbel coupling), so that the
draft model draws what the model will draw, as far as the two agree. Knows nothing of who accepts its drafts; what it
computes wrongly costs acceptance, never a result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cadenza.decoding.branch import Branch
from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.runner import ModelRunner
from cadenza.decoding.scheduler import Span, Step
from cadenza.decoding.speculation.base import Owners, Trust, Wish, num_equal
from cadenza.decoding.speculation.masks_ahead import MasksAhead

_FIRST_TRUST = (4.0, 5.0)
_MAX_CATCH_UP = 64  # tokens in one step: a branch that was not drafted for long must not hold up others


@dataclass(slots=True, eq=False)
class _Shadow:
    """A branch as the draft model sees it: drafts are tokens like any other."""

    branch: Branch
    num_known: int
    """The branch's own tokens; those behind them are drafts."""
    trust: Trust

    def follow(self, branch: Branch, num_computed: int) -> None:
        """Take on the branch's tokens and blocks, keeping what is computed of the drafts that have become tokens.
        num_computed: the branch's, which is less than ours where it lost its blocks meanwhile."""
        drafts, came = self.branch.token_ids[self.num_known :], branch.token_ids[self.num_known :]
        self.trust.learn(drafts, came)
        num_same = self.num_known + num_equal(drafts, came)
        self.branch.num_computed = min(self.branch.num_computed, num_same, num_computed)
        self.branch.token_ids, self.num_known = branch.token_ids.copy(), branch.num_tokens
        self.branch.block_table = branch.block_table


class DraftModelDrafter:
    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        pipeline: LogitsPipeline,
        vocab_size: int,
        max_model_len: int,
        pass_cost: float,
    ) -> None:
        """pass_cost: of one forward pass, in the units of `StepCost`."""
        self._runner = runner
        self._cache = cache
        self._pipeline = pipeline
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._pass_cost = pass_cost
        self._shadows: dict[Branch, _Shadow] = {}

    def wish(self, branch: Branch, limit: int) -> Wish | None:
        if _knows_more(branch):
            return None
        num_tokens = min(limit, self._max_model_len - branch.num_tokens)
        if num_tokens <= 0:
            return None
        shadow = self._shadows.get(branch)
        trust = Trust(*_FIRST_TRUST) if shadow is None else shadow.trust
        cost = self._pass_cost / max(1, len(self._shadows))  # branches are drafted for together
        return Wish(num_tokens, trust.acceptance, cost)

    def propose(self, step: Step, room: Mapping[Branch, int], owners: Owners) -> dict[Branch, list[int]]:
        self._cache.copy_blocks(step.copies)
        spans = {span.branch: self._span(span, span.branch in room) for span in step.spans}
        due = {branch: span for branch, span in spans.items() if span is not None}
        drafts: dict[Branch, list[int]] = {branch: [] for branch in room}
        masks = MasksAhead(self._vocab_size, room, owners)
        while due:
            drawn = self._draw(due, drafts, owners, masks)
            due = {}
            for branch, token_id in drawn.items():
                shadow = self._shadows[branch].branch
                shadow.token_ids.append(token_id)
                drafts[branch].append(token_id)
                if len(drafts[branch]) < room[branch] and masks.accept(branch, token_id):
                    due[branch] = Span(shadow, shadow.num_computed, shadow.num_tokens)
        return drafts

    def _span(self, span: Span, is_drafted: bool) -> Span | None:
        """What to compute along with `span`: prompts always, answers where they are drafted for."""
        branch = span.branch
        if _knows_more(branch):
            return None
        if not is_drafted and span.start >= branch.num_prompt_tokens:
            return None
        known = self._shadows.get(branch)
        if known is None:
            shadow = replace(branch, token_ids=branch.token_ids.copy(), num_computed=span.start)
            known = self._shadows[branch] = _Shadow(shadow, branch.num_tokens, Trust(*_FIRST_TRUST))
        known.follow(branch, span.start)
        start, end = known.branch.num_computed, min(span.end, self._max_model_len)
        if start >= branch.num_prompt_tokens:
            end = min(end, start + _MAX_CATCH_UP)
        return Span(known.branch, start, end) if start < end else None

    def _draw(
        self,
        due: Mapping[Branch, Span],
        drafts: Mapping[Branch, Sequence[int]],
        owners: Owners,
        masks: MasksAhead,
    ) -> dict[Branch, int]:
        """Compute the spans; the next token of every branch that is drafted for and computed to its end."""
        output = self._runner(Step(list(due.values())))
        for span in due.values():
            span.branch.num_computed = span.end
        ready = [branch for branch, span in due.items() if branch in drafts and span.reaches_end]
        words, mask_of = masks.fill(ready)
        rows = [
            replace(
                owners[branch].row(branch, output.last_row[due[branch].branch], mask, drafts[branch]),
                num_logprobs=None,
                explain=False,
            )
            for branch, mask in mask_of.items()
        ]
        choices = self._pipeline(output.logits, rows, words) if rows else []
        return {
            branch: choice.token_id
            for branch, choice in zip(mask_of, choices, strict=True)
            if choice.token_id is not None
        }

    def forget(self, branch: Branch) -> None:
        self._shadows.pop(branch, None)


def _knows_more(branch: Branch) -> bool:
    """Its tokens may be some that an adapter has added, and that the draft model does not know."""
    return branch.adapters is not None and branch.adapters.num_tokens is not None
