"""Who drafts how much in a step: wishes, the rows worth it, the room there is, and what came of it.

Runs of tokens that a constraint has already decided on, and that wait for their log-probabilities, are drafts too,
with or without a drafter. Knows branches and their requests; no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cadenza.decoding.branch import Branch
from cadenza.decoding.scheduler import Scheduler, Step
from cadenza.decoding.speculation.base import Drafter, Owners, Wish
from cadenza.decoding.speculation.sharing import StepCost, share_rows
from cadenza.decoding.speculation.verification import Verification
from cadenza.decoding.strategies.base import Result


@dataclass(slots=True)
class SpeculationCounts:
    """Since the engine began. Tokens that a constraint had decided on are none of them."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Speculator:
    def __init__(
        self, scheduler: Scheduler, drafter: Drafter | None, num_speculative_tokens: int, step_cost: StepCost
    ) -> None:
        self.counts = SpeculationCounts()
        self._scheduler = scheduler
        self._drafter = drafter
        self._limit = num_speculative_tokens
        self._step_cost = step_cost
        self._verifications: dict[Branch, Verification] = {}

    def draft(self, step: Step, owners: Owners) -> None:
        """Give the step's branches drafts, as far as they are worth it and there is room."""
        self._verifications.clear()
        ready = [span.branch for span in step.spans if span.reaches_end]
        wishes = {branch: wish for branch in ready if (wish := self._wish(branch, owners)) is not None}
        shares = share_rows(wishes, step.num_rows, len(ready), self._step_cost)
        room = self._scheduler.make_room_for_drafts(step, shares)
        decided = {branch: branch.pending[:count] for branch, count in room.items() if branch.pending}
        guessed = {branch: count for branch, count in room.items() if branch not in decided}
        step.drafts = {branch: decided.get(branch, []) for branch in room}
        if self._drafter is not None:
            step.drafts |= self._drafter.propose(step, guessed, owners)
        for branch, drafts in step.drafts.items():
            self._verifications[branch] = Verification(
                branch, drafts, branch not in decided, branch.num_tokens
            )

    def _wish(self, branch: Branch, owners: Owners) -> Wish | None:
        strategy, sampling = owners[branch].strategy, owners[branch].request.sampling
        is_searching = strategy.needs.candidates is not None or strategy.needs.hidden
        if branch.num_generated == 0 or is_searching or sampling.is_stateful:
            return None
        if branch.pending:  # behind the last of them the mask would be needed
            return Wish(len(branch.pending) - 1, 1.0)
        limit = min(self._limit, owners[branch].remaining(branch) - 1)
        if self._drafter is None or limit <= 0:
            return None
        return self._drafter.wish(branch, limit)

    def keep(self, result: Result) -> None:
        """What the step says behind the branch's next draft."""
        self._verifications[result.branch].results.append(result)

    def following(self, results: Sequence[Result]) -> list[Result]:
        """The results behind these, of branches that have grown by the very tokens that were drafted."""
        verifications = [self._verifications.get(result.branch) for result in results]
        following = [verification.following() for verification in verifications if verification is not None]
        return [result for result in following if result is not None]

    def settle(self) -> None:
        """The step's results have been applied: keep what was computed of the drafts that were right."""
        for branch, verification in self._verifications.items():
            num_accepted = verification.num_accepted
            self._scheduler.settle(branch, num_accepted)
            if verification.is_guess:
                self.counts.num_drafts += 1
                self.counts.num_draft_tokens += len(verification.drafts)
                self.counts.num_accepted_tokens += num_accepted

    def forget(self, branch: Branch) -> None:
        if self._drafter is not None:
            self._drafter.forget(branch)
