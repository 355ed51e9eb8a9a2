"""What the server says of itself: its models, its health, its version, its numbers."""

from importlib.metadata import version as distribution_version
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from cadenza.server.errors import model_not_found
from cadenza.server.routes.context import Context, InContext

router = APIRouter()


@router.get("/health")
@router.get("/ping")
async def health(context: InContext) -> dict[str, str]:
    """200 where requests are taken; the errors of `Service.engine` are the 503s of loading and draining."""
    _ = context.service.engine
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": distribution_version("cadenza")}


@router.get("/metrics")
async def metrics(context: InContext) -> Response:
    return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def list_models(context: InContext) -> dict[str, Any]:
    """The served model under each of its names, then its adapters."""
    return {"object": "list", "data": _cards(context)}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, context: InContext) -> dict[str, Any]:
    adapter = context.targets.adapter_name(name)
    for card in _cards(context):
        if card["id"] == (name if card["parent"] is None else adapter):
            return {**card, "id": name}
    raise model_not_found(name)


def _cards(context: Context) -> list[dict[str, Any]]:
    _ = context.service.engine
    names = [_card(context, name, context.service.created, None) for name in context.service.model_names]
    adapters = [info for _, info in context.targets.listed()]
    return names + [
        _card(context, info.name, info.created, context.targets.parent_of(info)) for info in adapters
    ]


def _card(context: Context, name: str, created: int, parent: str | None) -> dict[str, Any]:
    """root: whose weights they are at bottom; never a path of this machine's."""
    engine = context.service.engine
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "cadenza",
        "root": engine.model.name,
        "parent": parent,
        "max_model_len": engine.max_model_len,
    }
