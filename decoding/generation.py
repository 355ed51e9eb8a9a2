"""The life of one request inside the engine: its branches, their text, when they end, what its stream is told.

The strategy decides, by these verbs: `fork`, `accept` and `append` (or both in one, `take`), `drop`, `restart`,
`send`, `tell`. Knows the model's ends and the request's parameters; no tensors but scores, no blocks, no threads.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch
from cadenza.decoding.dry import Dry
from cadenza.decoding.explanation import decided
from cadenza.decoding.request import (
    Delta,
    Event,
    FinishReason,
    GenerationRequest,
    PromptDone,
    RequestError,
    RequestFailed,
    TokenExplanation,
    TokenLogprob,
)
from cadenza.decoding.row import Choice, Row
from cadenza.decoding.strategies.base import Result, Strategy
from cadenza.decoding.stream import RequestStream

if TYPE_CHECKING:
    from cadenza.decoding.constraints.matcher import Matcher

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Generation:
    request: GenerationRequest
    stream: RequestStream
    strategy: Strategy
    root: Branch
    seed: int
    max_tokens: int
    eos_token_ids: frozenset[int]
    bad_words: Sequence[Sequence[int]]
    dry: Dry | None = None
    num_tokens: int | None = None
    """The size of the vocabulary, where an adapter adds tokens to the model's."""
    num_generated: int = 0
    """Tokens of all branches there ever were."""
    is_begun: bool = False
    """The prompt is computed."""
    live: list[Branch] = field(init=False)
    """Branches that may still grow."""
    stems: list[Branch] = field(init=False)
    """Live branches that are a prompt only: when it is computed, the strategy begins with it."""
    forked: list[Branch] = field(default_factory=list)
    """New since the engine last asked; likewise the others."""
    restarted: list[Branch] = field(default_factory=list)
    retired: list[Branch] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    _events: list[Event] = field(default_factory=list)
    _pristine: Branch = field(init=False)
    _num_branches: int = 1

    def __post_init__(self) -> None:
        self.live, self.stems = [self.root], [self.root]
        self._pristine = replace(self.root, matcher=None).fork(0, 0)

    @property
    def is_finished(self) -> bool:
        return self.is_begun and not self.live

    @property
    def wants_scores(self) -> bool:
        """Every token's log-probability is asked for, so that none may be skipped."""
        request = self.request
        return request.sampling.logprobs is not None or request.explain or self.strategy.needs.scores

    def remaining(self, branch: Branch) -> int:
        """Tokens that the branch may still be given."""
        return self.max_tokens - branch.num_generated

    # what the engine asks

    def begin(self, stem: Branch) -> list[Branch]:
        """The prompt is computed. Returns the branches that the strategy wants tokens for, if any are allowed."""
        self.stems.remove(stem)
        if not self.is_begun:
            self.is_begun = True
            wants_logprobs = self.request.sampling.prompt_logprobs is not None
            self.tell(
                PromptDone(
                    num_prompt_tokens=stem.num_prompt_tokens,
                    num_cached_tokens=stem.num_cached_tokens or 0,
                    logprobs=tuple(self.prompt_logprobs) if wants_logprobs else None,
                )
            )
        if self.max_tokens > 0:
            return self.strategy.begin(stem, self)
        self._finish(stem, "length")
        for index in range(self.request.sampling.n):
            self.tell(Delta(index, "", finish_reason="length", closed_early=_closed_early(stem)))
        return []

    def row(
        self, branch: Branch, logits_row: int, mask: int | None = None, drafts: Sequence[int] = ()
    ) -> Row:
        """The row behind the branch's tokens and `drafts`, which may come to follow them."""
        params, needs = self.request.sampling, self.strategy.needs
        generated = branch.generated  # a copy
        generated += drafts
        return Row(
            logits_row=logits_row,
            sampling=params,
            seed=self.seed,
            branch=branch.index,
            prompt=branch.token_ids[: branch.num_prompt_tokens] if self._counts_prompt else (),
            generated=generated,
            banned=self._banned(generated),
            num_logprobs=0 if params.logprobs is None and needs.scores else params.logprobs,
            mask=mask,
            candidates=needs.candidates,
            explain=self.request.explain,
            dry=self.dry,
            num_tokens=self.num_tokens,
            mirostat_mu=branch.mirostat_mu,
        )

    @property
    def _counts_prompt(self) -> bool:
        return self.request.sampling.repetition_penalty != 1.0 or self.dry is not None

    def _banned(self, generated: list[int]) -> list[int]:
        params = self.request.sampling
        banned: list[int] = []
        if len(generated) < params.min_tokens:
            banned += [*self.eos_token_ids, *params.stop_token_ids]
        for word in self.bad_words:
            *head, last = word
            if not head or generated[-len(head) :] == head:
                banned.append(last)
        return banned

    def advance(self, results: Sequence[Result]) -> None:
        """Apply one step's results. Raises RequestError or RequestFailed if there is no token to go on with."""
        self.strategy.advance(results, self)

    def no_token(self) -> Exception:
        params = self.request.sampling
        for name in ("allowed_token_ids", "bad_words", "min_tokens"):
            if getattr(params, name):
                return RequestError(
                    f"{name} leaves no token to go on with, together with the request's other limits", name
                )
        return RequestFailed("the model's logits are not numbers")

    def deliver(self, *, is_cut_off: bool = False) -> None:
        """Hand the step's events to the stream, without waking who awaits them. is_cut_off: an error comes after them,
        although all branches may have ended."""
        events, self._events = self._events, []
        is_last = self.is_finished and not is_cut_off
        if events or is_last:  # a search may have nothing to say for many steps
            self.stream.put(events, is_last=is_last)

    # what the strategy does

    def fork(self, branch: Branch, index: int = 0) -> Branch:
        """A branch that shares `branch`'s past: its KV cache blocks, copied on write, and a clone of its matcher."""
        with _matching():
            fork = branch.fork(self._num_branches, index)
        self._num_branches += 1
        self.live.append(fork)
        self.forked.append(fork)
        return fork

    def restart(self, index: int) -> None:
        """Compute the prompt once more (mostly from the prefix cache), and begin again with a branch of that index."""
        stem = self._pristine.fork(self._num_branches, index)
        if self.request.constraint is not None:
            stem.matcher = self.request.constraint.matcher()
        self._num_branches += 1
        for branches in (self.live, self.stems, self.restarted):
            branches.append(stem)

    def drop(self, branch: Branch) -> None:
        """The branch is of no more use; what it has not sent is lost."""
        self.live.remove(branch)
        if branch in self.forked:
            self.forked.remove(branch)
        else:
            self.retired.append(branch)

    def take(self, result: Result) -> None:
        """Append the token drawn, or the one that the constraint needs in its place."""
        branch, drawn = result.branch, result.choice.token_id
        if drawn is None:
            raise self.no_token()
        if branch.pending:
            self.append(branch, replace(result.scored(branch.pending.pop(0)), decision="forced"))
        elif (token_id := self.accept(branch, drawn)) == drawn:
            self.append(branch, result.choice)
        else:
            self.append(branch, replace(result.scored(token_id), decision="closing"))

    def accept(self, branch: Branch, token_id: int) -> int:
        """Let the branch's matcher go on by a token that its mask allows. Returns that token, or another one to
        append in its place, so that the rest of the text still fits the budget."""
        if branch.matcher is None:
            return token_id
        with _matching():
            return branch.matcher.accept(token_id, self.remaining(branch))

    def append(self, branch: Branch, choice: Choice) -> None:
        """Let the branch grow by a token that its matcher has accepted. The branch may be finished then."""
        token_id = choice.token_id
        assert token_id is not None
        if choice.logprob is not None:
            branch.cumulative_logprob += choice.logprob.logprob
        if choice.mirostat_mu is not None:
            branch.mirostat_mu = choice.mirostat_mu
        if branch.matcher is None:
            forced: Sequence[int] = ()
            text = self._text_and_end(branch, token_id)
        else:
            with _matching():
                forced = self._forced(branch, branch.matcher, token_id)
                text = self._constrained_text_and_end(branch, branch.matcher, (token_id, *forced))
        if branch.is_finished:
            text += branch.text.flush()
            if branch.text.stop_string is not None and branch.stop_reason is None:
                branch.finish_reason, branch.stop_reason = "stop", branch.text.stop_string
        self.num_generated += 1 + len(forced)
        branch.unsent.append(
            Delta(
                branch.index,
                text,
                (token_id, *forced),
                (choice.logprob,) if choice.logprob and self.request.sampling.logprobs is not None else None,
                branch.finish_reason,
                branch.stop_reason,
                num_forced_tokens=(choice.decision == "forced") + len(forced),
                closed_early=_closed_early(branch),
                explanations=_explanations(branch, choice),
            )
        )

    def send(
        self, branch: Branch, index: int | None = None, count: int | None = None, score: float | None = None
    ) -> None:
        """Let go of what the branch has to say, or of its first `count` pieces, as choice `index` (None: its own).
        A score goes out with the finish reason."""
        sent, branch.unsent = branch.unsent[:count], [] if count is None else branch.unsent[count:]
        for delta in sent:
            index = delta.index if index is None else index
            if index != delta.index or score is not None:
                delta = replace(delta, index=index, score=None if delta.finish_reason is None else score)
            self._events.append(delta)

    def tell(self, event: Event) -> None:
        self._events.append(event)

    # text and ends

    def _forced(self, branch: Branch, matcher: "Matcher", token_id: int) -> Sequence[int]:
        """The tokens to which the constraint leaves no alternative after `token_id`. Where scores are wanted they
        come one by one, as the model is asked about each of them."""
        if token_id in self.eos_token_ids or branch.pending or not self.strategy.needs.jumps:
            return ()
        forced = matcher.forced(self.remaining(branch) - 1)
        if not self.wants_scores:
            return forced
        branch.pending = forced
        return ()

    def _text_and_end(self, branch: Branch, token_id: int) -> str:
        """The text that the token makes certain; marks the branch finished where the token ends it."""
        branch.token_ids.append(token_id)
        params = self.request.sampling
        may_stop = branch.num_generated >= params.min_tokens
        if token_id in self.eos_token_ids and not params.ignore_eos:
            self._finish(branch, "stop")
            return ""
        if token_id in params.stop_token_ids and may_stop:
            self._finish(branch, "stop", token_id)
            return branch.text.push(token_id) if params.include_stop_str_in_output else ""
        text = branch.text.push(token_id, may_stop=may_stop)
        if branch.text.stop_string is not None:
            self._finish(branch, "stop", branch.text.stop_string)
        elif branch.num_generated >= self.max_tokens:
            self._finish(branch, "length")
        return text

    def _constrained_text_and_end(self, branch: Branch, matcher: "Matcher", token_ids: Sequence[int]) -> str:
        """The constraint, the model's EOS and the budget are all that may end the text: never in its middle."""
        branch.token_ids += token_ids
        is_eos = token_ids[0] in self.eos_token_ids
        text = "" if is_eos else "".join(branch.text.push(token_id) for token_id in token_ids)
        if is_eos or (matcher.is_ended and not branch.pending):
            self._finish(branch, "length" if matcher.limited else "stop")
        elif branch.num_generated >= self.max_tokens:
            if not matcher.is_complete:
                raise RequestFailed("the constraint's text is not complete at the end of its tokens")
            self._finish(branch, "length")
        return text

    def _finish(self, branch: Branch, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        branch.finish_reason, branch.stop_reason = reason, stop_reason
        self.drop(branch)


@contextmanager
def _matching() -> Iterator[None]:
    """Whatever a matcher raises is the failure of its request."""
    try:
        yield
    except RequestFailed:
        raise
    except BaseException as error:  # a panic in native code is no Exception
        log.exception("a matcher failed")
        raise matcher_failed(error) from error


def matcher_failed(error: BaseException) -> RequestFailed:
    return RequestFailed(f"the constraint's matcher failed: {error}")


def _explanations(branch: Branch, choice: Choice) -> tuple[TokenExplanation, ...] | None:
    if choice.explanation is None:
        return None
    budget_binds = branch.matcher is not None and branch.matcher.limited
    return (decided(choice.explanation, choice.decision, budget_binds=budget_binds),)


def _closed_early(branch: Branch) -> bool | None:
    """Whether the budget decided how a constrained text ends; None for other texts, and before the end."""
    if branch.matcher is None or not branch.is_finished:
        return None
    return branch.finish_reason == "length"
