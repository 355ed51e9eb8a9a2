"""`cadenza serve`: listens at once, loads in the background, drains before it ends.

A probe sees the port open and /health at 503 until the model is there, and 503 again while draining.
"""

import argparse
import gc
import logging
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cadenza.models.errors import ModelError
from cadenza.server.commands.adapters import adapter_sources, allows_updates, check_adapters
from cadenza.server.commands.options import engine_config, load_config
from cadenza.server.commands.report import adapters_line, report_lines
from cadenza.server.service import ServerSettings, Service

if TYPE_CHECKING:
    from cadenza.decoding import Engine
    from cadenza.server.http_server import DrainingServer


def serve(args: argparse.Namespace) -> int:
    sys.setswitchinterval(0.0005)  # the engine must not wait 5 ms for the event loop to yield the interpreter
    gc.disable()  # until all is loaded: it would look for garbage among modules, for half a second
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    settings = server_settings(args)
    check_adapters(args, settings)
    listener = _listen(args.host, args.port)
    service = Service(settings=settings)
    loading = Loading(service, args, _url(args.host, listener))
    loading.start()

    from cadenza.server.http_server import DrainingServer  # while the loader imports torch

    server = DrainingServer(service, drain_timeout=args.shutdown_timeout, log_level=args.log_level)
    loading.attach(server)
    server.run(sockets=[listener])
    gc.unfreeze()
    if loading.error is not None:
        raise loading.error
    if loading.is_alive():
        # The loader cannot be interrupted, and the interpreter cannot end in order while it runs.
        sys.stdout.flush()
        os._exit(0)
    return 0


def server_settings(args: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        served_model_names=tuple(args.served_model_name),
        api_keys=tuple(args.api_key) or _key_in("CADENZA_API_KEY"),
        admin_api_keys=tuple(args.admin_api_key) or _key_in("CADENZA_ADMIN_API_KEY"),
        allows_keyless_updates=allows_updates(),
        adapter_sources=adapter_sources(args),
    )


def _key_in(variable: str) -> tuple[str, ...]:
    key = os.environ.get(variable)
    return (key,) if key else ()


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded: a port in use is told at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ModelError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class Loading(threading.Thread):
    """Puts the engine into the service; where it cannot, keeps the error and ends the server."""

    def __init__(self, service: Service, args: argparse.Namespace, url: str) -> None:
        super().__init__(name="cadenza-loading", daemon=True)
        self._service = service
        self._args = args
        self._url = url
        self._server: Future[DrainingServer] = Future()
        self.error: Exception | None = None

    def attach(self, server: "DrainingServer") -> None:
        """Name the server to end; it is made while we load."""
        self._server.set_result(server)

    def run(self) -> None:
        start = time.perf_counter()
        try:
            from cadenza.decoding import Engine

            imported = time.perf_counter()
            engine = Engine.load(self._args.model, load_config(self._args), engine_config(self._args))
        except Exception as error:  # the main thread tells it, once the server has ended
            self.error = error
            self._server.result().stop()
            return
        gc.freeze()  # a collection that walks all of torch's objects would stall everyone's tokens
        gc.enable()
        self._service.loaded = engine
        _report(engine, self._url, imported - start, time.perf_counter() - start)


def _report(engine: "Engine", url: str, imports: float, total: float) -> None:
    """Where the time went, what there is room for, where to ask."""
    stages = {"imports": imports, **engine.description.timings}
    stages["engine"] = max(0.0, total - sum(stages.values()))
    adapters = [] if engine.adapters is None else engine.adapters.list()
    lines = report_lines(engine.description, stages, total, url, adapters_line(engine.config, adapters))
    print("\n".join(lines), flush=True)
