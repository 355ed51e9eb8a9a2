"""Puts the server together: routes, errors, keys. Whether a model is loaded is for `Service` to know."""

from fastapi import FastAPI

from cadenza.server import errors
from cadenza.server.metrics import ServerMetrics
from cadenza.server.middleware import ApiKeys, RequestIds
from cadenza.server.routes import adapters, generate, status, tokens
from cadenza.server.routes.context import Context
from cadenza.server.service import Service
from cadenza.server.targets import Targets


def create_app(service: Service) -> FastAPI:
    # No generated documentation pages: they would show FastAPI's own errors, which this server never sends.
    app = FastAPI(title="Cadenza", openapi_url=None, redirect_slashes=False)
    app.state.context = Context(service, ServerMetrics(service), Targets(service))
    errors.install(app)
    for routes in (generate, tokens, adapters, status):
        app.include_router(routes.router)
    settings = service.settings
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=(*settings.api_keys, *settings.admin_api_keys))
    app.add_middleware(RequestIds)
    return app
