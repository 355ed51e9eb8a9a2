"""One step of the engine: schedule → draft → run → choose → advance. Runs on the engine's thread only.

Everything that a step touches belongs to it; the rest of the program talks to it through `engine`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cadenza.decoding.bitmask import BitmaskFiller, StepBitmask
from cadenza.decoding.block_pool import BlockPool
from cadenza.decoding.branch import Branch
from cadenza.decoding.generation import Generation, matcher_failed
from cadenza.decoding.logits import LogitsPipeline, token_logprobs
from cadenza.decoding.request import RequestError, RequestFailed
from cadenza.decoding.row import Choice, Row
from cadenza.decoding.runner import ModelRunner, StepLogits
from cadenza.decoding.scheduler import Scheduler, Step
from cadenza.decoding.speculation.speculator import Speculator
from cadenza.decoding.strategies.base import Result
from cadenza.decoding.stream import RequestStream, wake

log = logging.getLogger(__name__)


@dataclass(slots=True)
class TokenCounts:
    prompt: int = 0
    generated: int = 0


class EngineCore:
    def __init__(
        self,
        pool: BlockPool,
        scheduler: Scheduler,
        runner: ModelRunner,
        pipeline: LogitsPipeline,
        masks: BitmaskFiller,
        speculator: Speculator,
    ) -> None:
        self.pool = pool
        self.scheduler = scheduler
        self.tokens = TokenCounts()
        self.speculation = speculator.counts
        self._runner = runner
        self._pipeline = pipeline
        self._masks = masks
        self._speculator = speculator
        self._generations: dict[Branch, Generation] = {}
        self._hidden: dict[Branch, tuple[int, list[Tensor]]] = {}
        """Of branches that a strategy wants them of: position of the first, and [tokens, d] in pieces."""
        self._delivered: list[RequestStream] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, generation: Generation) -> None:
        self._generations[generation.root] = generation
        self.scheduler.add(generation.root)

    def remove(self, generation: Generation) -> None:
        """Forget a request, finished or not, and free all that its branches hold."""
        for branch in [branch for branch, owner in self._generations.items() if owner is generation]:
            self.scheduler.remove(branch)
            self._forget(branch)

    def fail(self, generation: Generation, error: Exception) -> None:
        self.remove(generation)
        generation.deliver(is_cut_off=True)
        generation.stream.close(error)

    def fail_all(self, error: Exception) -> None:
        for generation in set(self._generations.values()):
            self.fail(generation, error)

    def step(self) -> None:
        try:
            self._step()
        finally:
            wake(self._delivered)
            self._delivered.clear()

    def _step(self) -> None:
        step = self.scheduler.schedule()
        for branch, error in self.scheduler.take_failed():
            if branch in self._generations:  # another branch of the request may have failed before
                self.fail(self._generations[branch], RequestFailed(f"an adapter could not be used: {error}"))
        step.spans = [span for span in step.spans if span.branch in self._generations]
        if not step.spans:
            return
        try:
            self._speculator.draft(step, self._generations)
            filling = self._masks.start(self._constrained(step), step.drafts)
            output = self._runner(step, self._wants_prompt_logits(step), self._wants_hidden(step))
            bitmask = StepBitmask() if filling is None else filling.result()
            self.scheduler.complete(step)
            self._score_prompts(step, output)
            self._collect_hidden(step, output)
            members, rows = self._rows(step, output, bitmask)
            choices = self._pipeline(output.logits, rows, bitmask.words) if rows else []
        except Exception as error:  # whatever went wrong, only the requests of this step are lost
            log.exception("a step failed")
            alive = [span.branch for span in step.spans if span.branch in self._generations]
            for generation in {self._generations[branch] for branch in alive}:
                self.fail(generation, RequestFailed(f"the engine failed on this request: {error}"))
            return
        self._advance(self._results(members, rows, choices, output.logits, bitmask.words))
        self._speculator.settle()

    def _constrained(self, step: Step) -> list[tuple[Branch, int]]:
        """The constrained branches that get a token, and how many each may still have."""
        return [
            (span.branch, remaining)
            for span in step.spans
            if span.branch.matcher is not None
            and not span.branch.pending
            and span.reaches_end
            and (remaining := self._generations[span.branch].remaining(span.branch)) > 0
        ]

    def _wants_prompt_logits(self, step: Step) -> list[Branch]:
        return [
            span.branch
            for span in step.spans
            if not (generation := self._generations[span.branch]).is_begun
            and generation.request.sampling.prompt_logprobs is not None
        ]

    def _wants_hidden(self, step: Step) -> set[Branch]:
        return {span.branch for span in step.spans if self._generations[span.branch].strategy.needs.hidden}

    def _collect_hidden(self, step: Step, output: StepLogits) -> None:
        for span in step.spans:
            if span.branch in output.hidden:
                first, parts = self._hidden.get(span.branch, (0, []))
                if span.start != first + sum(len(part) for part in parts):
                    first, parts = span.start, []
                self._hidden[span.branch] = (first, [*parts, output.hidden[span.branch]])

    def _score_prompts(self, step: Step, output: StepLogits) -> None:
        """Log-probabilities of the prompt tokens that this step's logits predict."""
        for span in step.spans:
            if span.branch not in output.prompt_rows:
                continue
            first, count = output.prompt_rows[span.branch]
            generation = self._generations[span.branch]
            num_known = len(generation.prompt_logprobs) - 1 - span.start  # scored before a preemption
            targets = span.branch.token_ids[span.start + 1 + num_known : span.start + count + 1]
            if targets:
                logits = output.logits[first + num_known : first + num_known + len(targets)]
                logits = self._pipeline.columns(logits, generation.num_tokens)
                wanted = [generation.request.sampling.prompt_logprobs or 0] * len(targets)
                tokens = torch.tensor(targets, device=logits.device)
                generation.prompt_logprobs += token_logprobs(logits, tokens, wanted)

    def _rows(self, step: Step, output: StepLogits, bitmask: StepBitmask) -> tuple[list[Branch], list[Row]]:
        """Who needs a token, and who may need the next ones too. A request whose prompt is done begins here: its
        forks share one row of logits."""
        for branch, error in bitmask.errors.items():
            if branch in self._generations:  # another branch of the request may have failed before
                self.fail(self._generations[branch], matcher_failed(error))
        members: list[Branch] = []
        rows: list[Row] = []
        for branch, logits_row in output.last_row.items():
            if branch not in self._generations:
                continue
            generation = self._generations[branch]
            self.tokens.prompt += 0 if generation.is_begun else branch.num_prompt_tokens
            try:
                ready = self._begin(generation, branch) if branch in generation.stems else [branch]
            except Exception as error:
                log.exception("a request could not begin")
                self.fail(generation, RequestFailed(f"the request's branches could not begin: {error}"))
                continue
            for member in ready:
                members.append(member)
                rows.append(generation.row(member, logits_row, bitmask.row_of.get(branch)))
            drafts = step.drafts.get(branch, [])
            for ahead in range(1, 1 + bitmask.num_ahead.get(branch, len(drafts))):
                mask = None if branch not in bitmask.row_of else bitmask.row_of[branch] + ahead
                members.append(branch)
                rows.append(generation.row(branch, logits_row + ahead, mask, drafts[:ahead]))
        return members, rows

    def _begin(self, generation: Generation, stem: Branch) -> list[Branch]:
        """The branches that take their first token now; forks beyond the batch's limit come when there is room."""
        branches = generation.begin(stem)
        self._sync(generation)
        if not branches:  # max_tokens 0: there is nothing to generate
            self._deliver(generation)
        return [branch for branch in branches if self.scheduler.is_running(branch)]

    def _results(
        self,
        members: Sequence[Branch],
        rows: Sequence[Row],
        choices: Sequence[Choice],
        logits: Tensor,
        words: Tensor | None,
    ) -> dict[Generation, list[Result]]:
        """What the rows say of the branches as they are; what they say behind drafts is kept until those are tokens."""
        results: dict[Generation, list[Result]] = {}
        for branch, row, choice in zip(members, rows, choices, strict=True):
            first, hidden = self._hidden.pop(branch, (0, []))
            result = Result(
                branch,
                choice,
                partial(self._pipeline.scored, logits, row, words),
                torch.cat(hidden) if hidden else None,
                first,
            )
            if len(row.generated) == branch.num_generated:
                results.setdefault(self._generations[branch], []).append(result)
            else:
                self._speculator.keep(result)
        return results

    def _advance(self, results: dict[Generation, list[Result]]) -> None:
        for generation, own in results.items():
            num_before = generation.num_generated
            try:
                while own:
                    generation.advance(own)
                    own = self._speculator.following(own)
            except (RequestError, RequestFailed) as error:
                self.fail(generation, error)
                continue
            except Exception as error:
                log.exception("a strategy failed")
                self.fail(generation, RequestFailed(f"the decoding strategy failed: {error}"))
                continue
            self.tokens.generated += generation.num_generated - num_before
            self._sync(generation)
            self._deliver(generation)

    def _sync(self, generation: Generation) -> None:
        """Take on the branches that a strategy has made, and let go of those that it is done with."""
        for branch in (*generation.forked, *generation.restarted):
            self._generations[branch] = generation
        self.scheduler.replace(generation.retired, generation.forked)
        for branch in generation.restarted:
            self.scheduler.add(branch)
        for branch in generation.retired:
            self._forget(branch)
        for branches in (generation.forked, generation.restarted, generation.retired):
            branches.clear()

    def _deliver(self, generation: Generation) -> None:
        generation.deliver()
        self._delivered.append(generation.stream)

    def _forget(self, branch: Branch) -> None:
        del self._generations[branch]
        self._hidden.pop(branch, None)
        self._speculator.forget(branch)
