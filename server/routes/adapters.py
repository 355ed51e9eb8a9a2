"""Adapters while the server runs: what there is, loading, replacing, unloading, rolling back.

Changes need an admin key where there is one; otherwise they must have been allowed when the server was started.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from cadenza.decoding.adapters.errors import AdapterRefused, GenerationMismatch, PathNotAllowed
from cadenza.decoding.request import RequestError
from cadenza.models.adapters.locate import AdapterPathError
from cadenza.models.errors import ModelError
from cadenza.server.errors import ApiError
from cadenza.server.middleware import bears_one_of, key_refusal
from cadenza.server.protocol.adapters import LoadAdapter, RollBackAdapter, UnloadAdapter
from cadenza.server.protocol.wire import read
from cadenza.server.routes.context import Context, InContext
from cadenza.server.targets import finished

if TYPE_CHECKING:
    from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary

logger = logging.getLogger("cadenza.server")

router = APIRouter()


def _changing(request: Request, context: Context) -> "AdapterLibrary":
    """What is to be changed, for those who may; before anything of the body is read."""
    settings = context.service.settings
    if settings.admin_api_keys:
        if not bears_one_of(request.headers, settings.admin_api_keys):
            raise key_refusal("admin API key")
    elif not settings.allows_updates:
        raise ApiError(
            403,
            "Adapters cannot be changed while this server runs; to allow it, start it with --admin-api-key or with"
            " CADENZA_ALLOW_RUNTIME_LORA_UPDATING=1, and to load any, with --lora-allowed-roots or"
            " --lora-allowed-hub-ids.",
            type="permission_error",
            code="updates_not_allowed",
        )
    library = context.service.engine.adapters
    if library is None:
        raise RequestError(
            "This server has no adapters; start it with --enable-lora.", code="lora_not_enabled"
        )
    return library


@router.post("/load_lora_adapter")
@router.post("/v1/load_lora_adapter")
async def load(request: Request, context: InContext) -> PlainTextResponse:
    library = _changing(request, context)
    body = await read(request, LoadAdapter, context.service.settings.max_body_bytes)
    if body.lora_name in context.service.model_names:
        raise RequestError(f"lora_name: {body.lora_name} is what the served model is called.", "lora_name")
    path = await _located(context, body.lora_path)
    try:
        info = await finished(
            library.load(
                body.lora_name,
                path,
                in_place=body.load_inplace,
                expected_generation=body.expected_generation,
                pin=body.pinned,
            )
        )
    except GenerationMismatch as error:
        if error.code == "adapter_exists":
            raise _exists(body.lora_name) from None
        raise
    context.targets.listed()  # its number is that of its coming, whenever somebody asks
    return _success(info, "added")


@router.post("/unload_lora_adapter")
@router.post("/v1/unload_lora_adapter")
async def unload(request: Request, context: InContext) -> PlainTextResponse:
    library = _changing(request, context)
    body = await read(request, UnloadAdapter, context.service.settings.max_body_bytes)
    found = context.targets.find(body.lora_name)
    if found is not None and body.lora_int_id not in (None, found[0]):
        raise RequestError(
            f"lora_int_id: the adapter {body.lora_name} has the id {found[0]}, not {body.lora_int_id}.",
            "lora_int_id",
        )
    return _success(library.unload(body.lora_name, expected_generation=body.expected_generation), "removed")


@router.post("/v1/rollback_lora_adapter")
async def roll_back(request: Request, context: InContext) -> PlainTextResponse:
    library = _changing(request, context)
    body = await read(request, RollBackAdapter, context.service.settings.max_body_bytes)
    future = library.roll_back(body.lora_name, expected_generation=body.expected_generation)
    return _success(await finished(future), "rolled back")


@router.get("/v1/lora_adapters")
async def list_adapters(context: InContext) -> dict[str, Any]:
    return {"object": "list", "data": [_entry(context, *entry) for entry in context.targets.listed()]}


async def _located(context: Context, path: str) -> str:
    """The folder, fetched first if it is another machine's. 403 for what the server was not told to allow."""
    sources = context.service.settings.adapter_sources
    if sources is None:
        raise PathNotAllowed(
            "lora_path: this server loads adapters from nowhere but its command line; to allow more, start it with"
            " --lora-allowed-roots or --lora-allowed-hub-ids.",
            "lora_path",
        )
    try:
        return str(await asyncio.to_thread(sources.locate, path))
    except AdapterPathError as error:
        raise PathNotAllowed(str(error), "lora_path") from None
    except ModelError as error:
        raise AdapterRefused(str(error), "lora_path") from None


def _exists(name: str) -> ApiError:
    """In vLLM's words, which its clients look for."""
    return ApiError(
        400,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
        " 'load_inplace' to True.",
        param="lora_name",
        code="adapter_exists",
    )


def _success(info: "AdapterInfo", done: str) -> PlainTextResponse:
    """vLLM's text; the generation is what a later `expected_generation` would be."""
    logger.info("adapter %s %s: generation %d, of %s", info.name, done, info.generation, info.path)
    text = f"Success: LoRA adapter '{info.name}' {done} successfully"
    return PlainTextResponse(text, headers={"x-lora-generation": str(info.generation)})


def _entry(context: Context, number: int, info: "AdapterInfo") -> dict[str, Any]:
    return {
        "id": number,
        "name": info.name,
        "parent": context.targets.parent_of(info),
        "generation": info.generation,
        "previous_generation": info.previous_generation,
        "digest": info.digest,
        "rank": info.rank,
        "num_bytes": info.num_bytes,
        "pinned": info.is_pinned,
        "in_memory": info.is_in_memory,
        "users": info.num_users,
        "created": info.created,
    }
