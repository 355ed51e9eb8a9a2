"""The engine's place in the server: absent while loading, refused while draining. It knows no routes."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cadenza.server.errors import unavailable

if TYPE_CHECKING:  # the web side answers /health before torch is imported
    from cadenza.decoding import Engine
    from cadenza.models.adapters.locate import AdapterSources


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    served_model_names: tuple[str, ...] = ()
    """Empty: the model's own name."""
    api_keys: tuple[str, ...] = ()
    """Empty: everyone may ask."""
    admin_api_keys: tuple[str, ...] = ()
    """Of those who may change what is served; they may ask, too. Empty: whoever may ask."""
    allows_keyless_updates: bool = False
    """Without admin keys: whoever may ask may also load and unload adapters while the server runs."""
    adapter_sources: "AdapterSources | None" = None
    """Where adapters may then come from; None: nowhere."""
    max_body_bytes: int = 32 * 1024 * 1024

    @property
    def allows_updates(self) -> bool:
        """Adapters may be loaded and unloaded while the server runs."""
        return self.allows_keyless_updates or bool(self.admin_api_keys)


@dataclass
class Service:
    """One engine behind one server. Only the event loop's thread and the loading thread write to it."""

    settings: ServerSettings = field(default_factory=ServerSettings)
    loaded: "Engine | None" = None
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> "Engine":
        """The engine, or 503 where it takes no requests."""
        if self.draining:
            raise unavailable("The server is shutting down.", "draining")
        if self.loaded is None:
            raise unavailable("The model is still loading.", "loading")
        if self.loaded.is_closed:
            raise unavailable("The engine has stopped.", "stopped")
        return self.loaded

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model; none before it is loaded, unless the user named it."""
        own = () if self.loaded is None else (self.loaded.model.name,)
        return self.settings.served_model_names or own

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        if self.loaded is None:
            return 0
        stats = self.loaded.stats()
        return stats.num_running + stats.num_waiting
