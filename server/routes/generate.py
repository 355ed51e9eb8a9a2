"""/v1/chat/completions and /v1/completions: body, prompts, sampling parameters, generation, answer."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.spec import ConstraintSpec, check_combination
from cadenza.decoding.request import GenerationRequest, RequestError
from cadenza.server.answers.chat import ChatAnswer
from cadenza.server.answers.completion import CompletionAnswer
from cadenza.server.generation import Generation
from cadenza.server.prompts import chat_prompt, completion_prompts, truncated
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.sampling import SamplingFields, check_alternatives, sampling_params, wire_names
from cadenza.server.protocol.wire import read
from cadenza.server.respond import respond
from cadenza.server.routes.context import Context, InContext
from cadenza.server.targets import Target, finished

if TYPE_CHECKING:
    from cadenza.decoding import Engine
    from cadenza.decoding.constraints.constraint import Constraint

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, context: InContext) -> Response:
    engine = context.service.engine
    body = await read(request, ChatRequest, context.service.settings.max_body_bytes)
    async with context.targets.held(body.model, body.lora) as target:
        limit = engine.config.max_logprobs
        check_alternatives(body.top_logprobs, "top_logprobs", limit)
        check_alternatives(body.prompt_logprobs, "prompt_logprobs", limit)
        token_ids = await chat_prompt(target.tokenizer, body)
        token_ids = truncated(token_ids, body, body.new_tokens, engine.max_model_len)
        generation = await _submit(
            context,
            target,
            body,
            [token_ids],
            logprobs=body.num_alternatives,
            prompt_logprobs=body.prompt_logprobs,
        )
        answer = ChatAnswer(
            body, target.tokenizer, token_ids, model=target.name, fingerprint=target.fingerprint
        )
    return await respond(request, generation, answer, stream=body.stream, usage_chunks=body.includes_usage)


@router.post("/v1/completions")
async def completions(request: Request, context: InContext) -> Response:
    engine = context.service.engine
    body = await read(request, CompletionRequest, context.service.settings.max_body_bytes)
    async with context.targets.held(body.model, body.lora) as target:
        limit = engine.config.max_logprobs
        check_alternatives(body.logprobs, "logprobs", limit)
        check_alternatives(body.prompt_logprobs, "prompt_logprobs", limit)
        prompts = await completion_prompts(target.tokenizer, body, engine.max_model_len)
        if len(prompts) > engine.config.max_queue:
            raise RequestError(f"prompt must hold at most {engine.config.max_queue} prompts.", "prompt")
        generation = await _submit(
            context,
            target,
            body,
            [prompt.token_ids for prompt in prompts],
            logprobs=body.logprobs,
            prompt_logprobs=body.alternatives_in_prompt,
        )
        answer = CompletionAnswer(
            body, target.tokenizer, prompts, model=target.name, fingerprint=target.fingerprint
        )
    return await respond(request, generation, answer, stream=body.stream, usage_chunks=body.includes_usage)


async def _submit(
    context: Context,
    target: Target,
    body: SamplingFields,
    prompts: Sequence[tuple[int, ...]],
    *,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> Generation:
    """One engine request per prompt; an error names the field as the client did."""
    engine, spec = target.engine, body.constraint_spec
    with wire_names(body.renamed):
        sampling = sampling_params(
            body,
            defaults=engine.model.sampling_defaults,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        if spec is not None:
            check_combination(sampling, engine.model.eos_token_ids)
    constraint = await _compiled(engine, spec)
    with wire_names(body.renamed):
        requests = [
            GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=token_ids,
                sampling=sampling,
                constraint=constraint,
                strategy=body.strategy,
                explain=body.explain,
                adapters=target.adapters,
                cache_salt=body.cache_salt,
                priority=body.priority,
            )
            for token_ids in prompts
        ]
        return Generation(engine, requests, context.metrics)


async def _compiled(engine: "Engine", spec: ConstraintSpec | None) -> "Constraint | None":
    """The request's constraint, ready for use. Other requests go on while it is compiled."""
    if spec is None:
        return None
    try:
        return await finished(engine.constraints.compile(spec))
    except ConstraintError as error:
        raise RequestError(f"{spec.param}: {error}", spec.param, "invalid_constraint") from None
