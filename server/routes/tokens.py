"""/tokenize, /detokenize and /tokenizer_info: the tokenizer, for clients that count or score tokens."""

from typing import Any

from fastapi import APIRouter, Request

from cadenza.server.prompts import chat_prompt, text_prompt
from cadenza.server.protocol.sampling import check_token_ids
from cadenza.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from cadenza.server.protocol.wire import read
from cadenza.server.routes.context import InContext

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, context: InContext) -> dict[str, Any]:
    engine = context.service.engine
    body = await read(request, TokenizeRequest, context.service.settings.max_body_bytes)
    async with context.targets.held(body.model) as target:
        tokenizer = target.tokenizer
    if body.prompt is not None:
        tokens = await text_prompt(
            tokenizer, body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    else:
        tokens = await chat_prompt(tokenizer, body.chat)
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": [tokenizer.token_string(token) for token in tokens] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request, context: InContext) -> dict[str, Any]:
    _ = context.service.engine
    body = await read(request, DetokenizeRequest, context.service.settings.max_body_bytes)
    async with context.targets.held(body.model) as target:
        tokenizer = target.tokenizer
    check_token_ids(body.tokens, "tokens", tokenizer.vocab_size)
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


@router.get("/tokenizer_info")
async def tokenizer_info(context: InContext, model: str | None = None) -> dict[str, Any]:
    async with context.targets.held(model) as target:
        tokenizer = target.tokenizer

    def text(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token_string(token_id)

    return {
        "bos_token": text(tokenizer.bos_token_id),
        "eos_token": text(tokenizer.eos_token_id),
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template,
    }
