"""The fields that chat and completions share, and their translation to the engine's `SamplingParams`.

Ranges are checked once, by `SamplingParams` and by the engine; here are only the wire's own rules, and its
names for things that the engine names otherwise.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BeforeValidator

from cadenza.decoding.request import RequestError, SamplingParams
from cadenza.decoding.strategies.spec import ContrastiveSearch, is_search, search_defaults
from cadenza.server.protocol.adapters import AdapterFields
from cadenza.server.protocol.constraints import ConstraintFields
from cadenza.server.protocol.strategies import StrategyFields
from cadenza.server.protocol.wire import Wire

MAX_CHOICES = 128
"""OpenAI's own bound on `n`."""


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Wire):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False

    def check(self) -> None:
        if self.include_obfuscation:
            raise RequestError(
                "stream_options.include_obfuscation is not supported yet.",
                "stream_options.include_obfuscation",
                "unsupported_parameter",
            )


class SamplingFields(ConstraintFields, StrategyFields, AdapterFields):
    """None: the client did not say; then the model's own default holds, else that of `SamplingParams`."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: list[str] | None = None
    dry_penalty_last_n: int | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_strings)] = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None

    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    cache_salt: str = ""
    priority: int = 0

    def check(self) -> None:
        super().check()
        if self.stream_options is not None:
            if not self.stream:
                raise RequestError("stream_options is only allowed when stream is true.", "stream_options")
            self.stream_options.check()
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError(
                "max_tokens and max_completion_tokens are the same field; their values differ.",
                "max_completion_tokens",
            )
        if not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {self.n}.", "n")
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise RequestError(
                "truncate_prompt_tokens must be at least 1, or -1 for what fits, "
                f"got {self.truncate_prompt_tokens}.",
                "truncate_prompt_tokens",
            )
        if self.self_consistency is not None:
            self.self_consistency.check()
        _ = self.strategy

    @property
    def new_tokens(self) -> int | None:
        """The bound on a choice's tokens; None: as many as the context holds."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream's chunks have a `usage` member."""
        options = self.stream_options
        return options is not None and (options.include_usage or options.continuous_usage_stats)

    @property
    def includes_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def renamed(self) -> dict[str, str]:
        """What the engine calls one of our fields, where that differs from what this client called it."""
        names = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**names, **self.strategy_renamed}


def sampling_params(
    body: SamplingFields,
    *,
    defaults: Mapping[str, Any],
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """`defaults` are the model's own, used where `body` is silent, and left out where they mean nothing."""
    if is_search(body.strategy):
        defaults = search_defaults(defaults)
    asked = {name: value for name in _COPIED if (value := getattr(body, name)) is not None}
    for name in _LISTS:
        if name in asked:
            asked[name] = tuple(asked[name])
    if isinstance(body.strategy, ContrastiveSearch):
        asked.pop("top_k", None)  # the strategy's number of candidates; it truncates nothing
    asked["logit_bias"] = _token_biases(body.logit_bias or {})
    return SamplingParams(
        **{**defaults, **asked},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        max_tokens=body.new_tokens,
    )


_LISTS = ("bad_words", "allowed_token_ids", "stop", "stop_token_ids", "dry_sequence_breakers")
_TRANSLATED = ("logit_bias", "logprobs", "prompt_logprobs", "max_tokens")
_COPIED = tuple(field.name for field in fields(SamplingParams) if field.name not in _TRANSLATED)


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise RequestError("logit_bias must map token ids to numbers.", "logit_bias") from None


def check_token_ids(token_ids: Iterable[int], param: str, vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1}).", param
            )


def check_alternatives(count: int | None, param: str, limit: int) -> None:
    """The server's `--max-logprobs`, under the name by which the client asked."""
    if count is not None and not 0 <= count <= limit:
        raise RequestError(f"{param} must be between 0 and {limit}, got {count}.", param)


@contextmanager
def wire_names(renamed: Mapping[str, str]) -> Iterator[None]:
    """Let errors of the engine name the field as the client did."""
    try:
        yield
    except RequestError as error:
        if error.param is None or error.param not in renamed:
            raise
        name = renamed[error.param]
        message = str(error)
        if message.startswith(error.param):
            message = name + message.removeprefix(error.param)
        raise RequestError(message, name, error.code) from None
