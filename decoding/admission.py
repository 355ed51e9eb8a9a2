"""From a request to what the engine runs: everything that only the model can tell is checked here, once.

A request that passes can be served to its end; one that cannot is a `RequestError` that names the field.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.block_pool import prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.config import EngineConfig
from cadenza.decoding.constraints.spec import check_combination
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.dry import Dry, find_breakers
from cadenza.decoding.generation import Generation
from cadenza.decoding.request import GenerationRequest, RequestError, SamplingParams
from cadenza.decoding.strategies.factory import strategy_of
from cadenza.decoding.strategies.room import Room
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.decoding.stream import RequestStream
from cadenza.models import LoadedModel, Tokenizer

if TYPE_CHECKING:
    from cadenza.decoding.constraints.constraint import Constraint


def admit(
    request: GenerationRequest,
    *,
    model: LoadedModel,
    config: EngineConfig,
    max_model_len: int,
    num_kv_tokens: int,
    arrival: int,
    seed: int,
    stream: RequestStream,
) -> Generation:
    """Raises RequestError."""
    params, adapters = request.sampling, request.adapters
    num_tokens = tokenizer = None
    if adapters is not None:
        _check_adapters(adapters, config)
        num_tokens, tokenizer = adapters.num_tokens, adapters.tokenizer
    tokenizer = tokenizer or model.tokenizer
    vocab_size = num_tokens or min(model.tokenizer.vocab_size, model.config.vocab_size)
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    room = Room(num_kv_tokens, config.block_size)
    max_tokens = _max_tokens(request, max_model_len, room)
    if request.constraint is not None:
        check_combination(params, model.eos_token_ids)
        _check_shortest(request.constraint, max_tokens, params)
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and wanted > config.max_logprobs:
            raise RequestError(f"{name} must be at most {config.max_logprobs}, got {wanted}", name)
    strategy = strategy_of(request, max_tokens, config, room)
    root = Branch(
        order=(request.priority, arrival, 0),
        index=0,
        num_prompt_tokens=len(request.prompt_token_ids),
        token_ids=list(request.prompt_token_ids),
        text=TextStream(
            IncrementalDetokenizer(tokenizer, request.prompt_token_ids, params.skip_special_tokens),
            StopStringFilter(params.stop, params.include_stop_str_in_output),
        ),
        cache_root=prefix_root("" if adapters is None else adapters.key, request.cache_salt),
        adapters=adapters,
        reads_cache=params.prompt_logprobs is None and not strategy.needs.hidden,
        matcher=None if request.constraint is None else request.constraint.matcher(),
    )
    return Generation(
        request=request,
        stream=stream,
        strategy=strategy,
        root=root,
        seed=seed,
        max_tokens=max_tokens,
        eos_token_ids=_ends(request, model),
        bad_words=_bad_words(tokenizer, params),
        dry=_dry(tokenizer, params),
        num_tokens=num_tokens,
    )


def _ends(request: GenerationRequest, model: LoadedModel) -> frozenset[int]:
    """The tokens that end an answer: the model's, and what an adapter's tokenizer names beside them. A constraint knows
    only the model's, which are enough, since it decides where its text may end."""
    own = None if request.adapters is None else request.adapters.tokenizer
    if own is None or own.eos_token_id is None or request.constraint is not None:
        return frozenset(model.eos_token_ids)
    return frozenset({*model.eos_token_ids, own.eos_token_id})


def _check_adapters(adapters: AdapterSet, config: EngineConfig) -> None:
    if not config.enable_lora:
        raise RequestError("this engine takes no adapters: it was not started with enable_lora", "lora")
    if len(adapters.terms) > config.max_loras:
        raise RequestError(
            f"the request combines {len(adapters.terms)} adapters, but there is room for {config.max_loras}"
            " on the device (max_loras)",
            "lora",
        )


def _check_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} has token id {token_id}, outside the vocabulary of {vocab_size}", param
            )


def _max_tokens(request: GenerationRequest, max_model_len: int, kv_room: Room) -> int:
    num_prompt, asked = len(request.prompt_token_ids), request.sampling.max_tokens
    room = max_model_len - num_prompt
    if num_prompt == 0:
        raise RequestError("the prompt is empty: there is no token to go on from", "prompt")
    if room < 0 or (room == 0 and asked != 0):
        raise RequestError(
            f"the prompt has {num_prompt} tokens, which leaves no room for an answer:"
            f" the model's context length is {max_model_len} tokens",
            "prompt",
            "context_length_exceeded",
        )
    if asked is not None and asked > room:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {asked}, {num_prompt + asked} together:"
            f" the model's context length is {max_model_len} tokens",
            "max_tokens",
            "context_length_exceeded",
        )
    if request.sampling.min_tokens > room:
        raise RequestError(
            f"min_tokens is {request.sampling.min_tokens}, but the context has room for {room} more tokens",
            "min_tokens",
        )
    if asked is None and isinstance(request.strategy, BeamSearch):
        return max(1, min(room, kv_room.longest(request.strategy.num_beams, num_prompt)))
    return room if asked is None else asked


def _check_shortest(constraint: "Constraint", max_tokens: int, params: SamplingParams) -> None:
    if constraint.min_tokens <= max_tokens:
        return
    needed = f"the shortest answer that satisfies the constraint has {constraint.min_tokens} tokens"
    if params.max_tokens is not None:
        raise RequestError(f"max_tokens is {max_tokens}, but {needed}", "max_tokens")
    raise RequestError(
        f"the context has room for {max_tokens} more tokens, but {needed}",
        "prompt",
        "context_length_exceeded",
    )


def _bad_words(tokenizer: Tokenizer, params: SamplingParams) -> list[list[int]]:
    """Each word as it is tokenized at the start of a text and after a space."""
    sequences: list[list[int]] = []
    for word in params.bad_words:
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in sequences:
                sequences.append(ids)
    return sequences


def _dry(tokenizer: Tokenizer, params: SamplingParams) -> Dry | None:
    if params.dry_multiplier == 0.0 or params.dry_penalty_last_n == 0:
        return None
    return Dry(
        multiplier=params.dry_multiplier,
        base=params.dry_base,
        allowed_length=params.dry_allowed_length,
        last_n=params.dry_penalty_last_n,
        breakers=find_breakers(tokenizer, tuple(params.dry_sequence_breakers)),
    )
