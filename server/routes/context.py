"""What the routes share: the service and the metrics of the app that they run in."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cadenza.server.metrics import ServerMetrics
from cadenza.server.service import Service


@dataclass(frozen=True)
class Context:
    service: Service
    metrics: ServerMetrics


def _context(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


InContext = Annotated[Context, Depends(_context)]
