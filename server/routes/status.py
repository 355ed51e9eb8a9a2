"""What the server says of itself: its models, its health, its version, its numbers."""

from importlib.metadata import version as distribution_version
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from cadenza.server.routes.context import InContext

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
    _ = context.service.engine
    return {"object": "list", "data": [_card(context, name) for name in context.service.model_names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, context: InContext) -> dict[str, Any]:
    return _card(context, context.service.resolve_model(name))


def _card(context: InContext, name: str) -> dict[str, Any]:
    engine = context.service.engine
    return {
        "id": name,
        "object": "model",
        "created": context.service.created,
        "owned_by": "cadenza",
        "root": engine.model.name,
        "parent": None,
        "max_model_len": engine.max_model_len,
    }
