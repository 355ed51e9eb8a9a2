"""What the routes share: the service, the metrics and the targets of the app that they run in."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cadenza.server.metrics import ServerMetrics
from cadenza.server.service import Service
from cadenza.server.targets import Targets


@dataclass(frozen=True)
class Context:
    service: Service
    metrics: ServerMetrics
    targets: Targets


def _context(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


InContext = Annotated[Context, Depends(_context)]
