"""What the engine is asked, and what it answers: plain frozen values, no HTTP, no tensors.

A request is token ids and parameters; the answer is a stream of events:

    PromptDone      once, when the prompt is in the KV cache (cached tokens, prompt log-probabilities)
    Delta           whenever a choice has news; its last one carries `finish_reason`
    VoteProgress    under self-consistency: after each sample, and once more when the vote is decided
    Unsent          tokens that were generated for answers that are not returned
    RequestFailed   raised by the stream in place of the next event, if the engine could not go on
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from cadenza.decoding.adapters.set import AdapterSet
    from cadenza.decoding.constraints.constraint import Constraint
    from cadenza.decoding.strategies.spec import StrategySpec

FinishReason = Literal["stop", "length"]
Decision = Literal["greedy", "sampled", "searched", "forced", "closing"]
"""How a token came about. forced: the constraint left no alternative; closing: it takes the place of the model's
choice, which would have left too few tokens to complete the text."""

MAX_BREAKERS = 32
MAX_BREAKER_BYTES = 40
"""Bounds on DRY's sequence breakers, each of which is looked for in the whole vocabulary."""


class RequestError(ValueError):
    """The caller's mistake. `param` names the field of the request that is at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFull(RuntimeError):
    """The waiting queue is at its bound; the caller should come back later."""


class EngineClosed(RuntimeError):
    """The engine is shutting down, or its thread has died of the error that is this one's cause."""


class RequestFailed(RuntimeError):
    """This one request cannot go on, through no fault of its caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. The names and defaults are those of the OpenAI and vLLM APIs.

    Construction checks every range and raises `RequestError` naming the field.
    """

    n: int = 1
    max_tokens: int | None = None
    """New tokens per choice; None: as many as the context holds. 0 is allowed: only the prompt is scored."""
    min_tokens: int = 0
    """EOS, stop ids and stop strings do not end a choice before it has so many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 or -1: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    """0 or -1: off."""
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    """Above 0.5 it excludes nothing."""
    mirostat: int = 0
    """0: off, 1, 2."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dynatemp_range: float = 0.0
    """The temperature follows the entropy, from temperature - range to temperature + range."""
    dynatemp_exponent: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    """0: off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dry_penalty_last_n: int = -1
    """-1: prompt and answer; 0: off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    """None: drawn from the system when the request is submitted."""
    logprobs: int | None = None
    """Alternatives per token; 0: only the chosen token; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {rule}, got {getattr(self, param)!r}", param)

        for name, kind in type(self).__annotations__.items():
            if kind is float:
                require(math.isfinite(getattr(self, name)), name, "a finite number")
        require(self.n >= 1, "n", "at least 1")
        require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        require(self.min_tokens >= 0, "min_tokens", "at least 0")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        # beyond these bounds products leave the range of float32, and masked tokens are no longer told from others
        require(0.0 <= self.temperature <= 1000.0, "temperature", "between 0 and 1000")
        require(self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for off")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(0.0 < self.typical_p <= 1.0, "typical_p", "above 0 and at most 1")
        require(0.001 <= self.repetition_penalty <= 1000.0, "repetition_penalty", "between 0.001 and 1000")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        self._check_family(require)
        require(all(-100 <= v <= 100 for v in self.logit_bias.values()), "logit_bias", "between -100 and 100")
        require(all(self.stop), "stop", "without empty strings")
        require(all(self.bad_words), "bad_words", "without empty strings")
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "non-empty",
        )
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        require(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0")
        require(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "at least 0")

    def _check_family(self, require: Callable[[bool, str, str], None]) -> None:
        """Of what llama.cpp and transformers have beside the usual."""
        require(self.top_n_sigma >= 0 or self.top_n_sigma == -1, "top_n_sigma", "at least 0, or -1 for off")
        require(0 <= self.epsilon_cutoff < 1, "epsilon_cutoff", "at least 0 and below 1")
        require(0 <= self.eta_cutoff < 1, "eta_cutoff", "at least 0 and below 1")
        require(0 <= self.xtc_probability <= 1, "xtc_probability", "between 0 and 1")
        require(0 <= self.xtc_threshold <= 1, "xtc_threshold", "between 0 and 1")
        require(self.mirostat in (0, 1, 2), "mirostat", "0, 1 or 2")
        require(self.mirostat_tau > 0, "mirostat_tau", "above 0")
        require(0 <= self.mirostat_eta <= 1, "mirostat_eta", "between 0 and 1")
        at_most = f"between 0 and the temperature ({self.temperature})"
        require(0 <= self.dynatemp_range <= self.temperature, "dynatemp_range", at_most)
        require(self.dynatemp_exponent >= 0, "dynatemp_exponent", "at least 0")
        require(self.dry_multiplier >= 0, "dry_multiplier", "at least 0")
        require(self.dry_base >= 1, "dry_base", "at least 1")
        require(self.dry_allowed_length >= 1, "dry_allowed_length", "at least 1")
        require(self.dry_penalty_last_n >= -1, "dry_penalty_last_n", "at least 0, or -1 for all")
        breakers, limit = self.dry_sequence_breakers, MAX_BREAKER_BYTES
        require(len(breakers) <= MAX_BREAKERS, "dry_sequence_breakers", f"at most {MAX_BREAKERS} strings")
        is_fine = all(0 < len(each.encode(errors="surrogatepass")) <= limit for each in breakers)
        require(is_fine, "dry_sequence_breakers", f"strings of 1 to {limit} bytes")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_stateful(self) -> bool:
        """How a token is drawn depends on more than the tokens before it: on how likely they were."""
        return self.mirostat != 0 and not self.is_greedy

    @property
    def has_thresholds(self) -> bool:
        """Some of what only changes a draw, and is off in most requests, is on."""
        return (
            self.top_n_sigma > 0
            or self.epsilon_cutoff > 0
            or self.eta_cutoff > 0
            or self.xtc_probability > 0
            or self.mirostat != 0
            or self.dynatemp_range > 0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt. Several prompts of one HTTP call are several requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraint: "Constraint | None" = None
    """What the answer must satisfy, as compiled by the engine's `constraints`."""
    strategy: "StrategySpec | None" = None
    """None: greedy decoding or sampling of `sampling.n` choices."""
    explain: bool = False
    """Say of every token how it came about."""
    adapters: "AdapterSet | None" = None
    """What the engine's `adapters` have given for the names in the request. The engine holds it until the request is
    over; whoever submits releases its own hold."""
    cache_salt: str = ""
    """Prefix-cache entries are only shared between requests of equal salt."""
    priority: int = 0
    """Lower runs first; equal ones in order of arrival."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the raw model distribution, unless `logprobs_mode` says otherwise."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely alternatives, best first."""


@dataclass(frozen=True, slots=True)
class TokenExplanation:
    """How a token came about. "Raw" is the model's own distribution, "final" what was drawn from: after the
    constraint, penalties, bias, temperature and truncation (greedy: at temperature 1, without truncation)."""

    token_id: int
    raw_probability: float
    final_probability: float
    rank: int
    """In the raw distribution, 1 for the most likely token."""
    entropy: float
    """Of the raw distribution, in nats."""
    mass_removed: float
    """Raw probability of all that the constraint forbids."""
    decision: Decision
    lost: tuple[tuple[int, float], ...] = ()
    """Beam search: (token id, beam score) of the best candidates that did not become a beam."""


@dataclass(frozen=True, slots=True)
class PromptDone:
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV cache came from the prefix cache."""
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One entry per prompt token, the first None; None where `prompt_logprobs` was not asked for."""


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. The texts of a choice's deltas, joined, are its text; likewise its tokens.

    Text may lag behind tokens: bytes of an unfinished UTF-8 character and what may become a stop string
    are held back until they are decided.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None for EOS and length."""
    num_forced_tokens: int = 0
    """Of `token_ids`: how many the constraint left no alternative to, and the model was not asked for."""
    closed_early: bool | None = None
    """With `finish_reason`, under a constraint: whether the budget of tokens decided how the text ends."""
    explanations: tuple[TokenExplanation, ...] | None = None
    """One per token, where the request asked for them."""
    score: float | None = None
    """With `finish_reason`: what the strategy ranked the choice by, if it ranks."""


@dataclass(frozen=True, slots=True)
class Unsent:
    """Tokens that were generated for answers that are not returned."""

    num_tokens: int
    num_forced_tokens: int = 0
    """Of them: how many a constraint left no alternative to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteProgress:
    """The state of a vote after a sample has finished."""

    sample: int
    """Its index; where `is_final`, that of the sample that is returned."""
    sample_answer: str | None
    """None: no answer was found in its text."""
    answer: str | None
    """The leader; where `is_final`, the winner. None: nobody has answered."""
    counts: tuple[tuple[str, int], ...]
    """(answer, votes), the leader first."""
    weights: tuple[tuple[str, float], ...]
    """(answer, sum of its votes' weights), in the same order."""
    num_finished: int
    num_stopped: int
    """Samples that were not run, because they could not change the winner. Known where `is_final`."""
    num_tokens: int
    """Generated for all samples so far."""
    num_tokens_saved: int
    """An estimate: the samples not run, at the mean length of those that were."""
    is_final: bool = False

    @property
    def num_abstained(self) -> int:
        """Finished samples in whose text no answer was found."""
        return self.num_finished - sum(votes for _, votes in self.counts)


Event = PromptDone | Delta | Unsent | VoteProgress
