"""uvicorn, with an end that lets running answers finish: 503 first, then no connections."""

import logging
import threading
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus

from cadenza.server.app import create_app
from cadenza.server.service import Service

logger = logging.getLogger("cadenza.server")

FLUSH_SECONDS = 5
"""For bytes on their way once the engine has stopped."""


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or ctrl-C drains, the second ends at once."""

    def __init__(self, service: Service, *, drain_timeout: float = 30.0, log_level: str = "warning") -> None:
        # Its own way to end streams would cut them off while they may still finish.
        AppStatus.enable_automatic_graceful_drain = False
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=log_level == "debug",
            lifespan="off",
            ws="none",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        logging.getLogger("uvicorn").setLevel("DEBUG" if log_level == "debug" else "WARNING")
        super().__init__(config)
        self._service = service
        self._drain_timeout = drain_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.force_exit = True
            self.stop()
        else:
            self.drain()

    def drain(self) -> None:
        """Refuse new requests, let running ones finish within the timeout, then stop. Returns at once."""
        self._service.draining = True
        threading.Thread(target=self._drain, name="cadenza-drain", daemon=True).start()

    def _drain(self) -> None:
        engine = self._service.loaded
        if engine is not None:
            unfinished = self._service.num_unfinished
            if unfinished:
                logger.info("%d requests may go on for %g s", unfinished, self._drain_timeout)
            engine.close(timeout=self._drain_timeout)
        self.stop()

    def stop(self) -> None:
        """Close the listening socket and the connections. From any thread."""
        self.should_exit = True
