"""What the logits pipeline is asked for a branch that needs a token, and what it answers. Plain values."""

from collections.abc import Sequence
from dataclasses import dataclass

from cadenza.decoding.dry import Dry
from cadenza.decoding.request import Decision, SamplingParams, TokenExplanation, TokenLogprob


@dataclass(frozen=True, slots=True)
class Candidates:
    """A wish for the most likely tokens, where a strategy searches instead of drawing one."""

    count: int
    normalized: bool
    """Whether they are scored by the distribution that masks, penalties and bias leave. If not, those act on the
    log-probabilities of the model, as in transformers' beam search, so that scores of texts can be compared."""


@dataclass(frozen=True, slots=True)
class Row:
    """One branch that needs a token."""

    logits_row: int
    """Its row in the forward pass' logits; branches that were just forked share one."""
    sampling: SamplingParams
    seed: int
    branch: int
    prompt: Sequence[int]
    generated: Sequence[int]
    banned: Sequence[int]
    """Token ids that may not come now: ends before min_tokens, last tokens of bad words."""
    num_logprobs: int | None
    """Alternatives wanted; 0: the chosen token's log-probability only; None: no log-probabilities."""
    mask: int | None = None
    """Its row in the step's bitmask, where a constraint says what may come."""
    candidates: Candidates | None = None
    """None: one token is drawn."""
    explain: bool = False
    dry: Dry | None = None
    num_tokens: int | None = None
    """The size of its vocabulary, where its adapter has one of its own; None: the model's."""
    mirostat_mu: float | None = None
    """Mirostat's state; None: its first token."""


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int | None
    """None: the row's bans leave no token, or its logits are not numbers; or candidates were asked for."""
    logprob: TokenLogprob | None
    decision: Decision
    candidates: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first; of equal ones the lower token first."""
    explanation: TokenExplanation | None = None
    mirostat_mu: float | None = None
    """Mirostat's state after this token. None where nothing was learned: a token that was not drawn says nothing
    about what to leave to the next draw."""
