"""What a request's `model` and `lora` stand for: the served model, an adapter of it, or a weighted set of adapters.

Names are resolved once per request, all at the same moment, and what they stood for is held until the engine has it:
a swap in between changes nothing. Knows no routes.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cadenza.decoding.adapters.errors import AdapterRefused, UnknownAdapter
from cadenza.decoding.request import QueueFull, RequestError
from cadenza.server.errors import ApiError, model_not_found, unavailable
from cadenza.server.protocol.adapters import LoraTerm
from cadenza.server.service import Service

if TYPE_CHECKING:
    from cadenza.decoding import Engine
    from cadenza.decoding.adapters.library import AdapterInfo
    from cadenza.decoding.adapters.set import AdapterSet
    from cadenza.models import Tokenizer

logger = logging.getLogger("cadenza.server")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Target:
    """What one request is answered with."""

    name: str
    """The model as the client has named it."""
    engine: "Engine"
    adapters: "AdapterSet | None"
    tokenizer: "Tokenizer"
    """The adapter's own, if it brings one."""

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the adapters, as it does with that of the model."""
        own = self.engine.model.fingerprint
        if self.adapters is None or not self.adapters.terms:  # all of them at scale 0: the model itself
            return own
        return f"{own}_{hashlib.sha256(self.adapters.key.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class _Named:
    """An adapter, and where the request names it."""

    name: str
    scale: float
    param: str
    asked: str

    @property
    def not_found(self) -> ApiError:
        if self.param == "model":
            return model_not_found(self.asked)
        message = f"{self.param}: the adapter `{self.asked}` does not exist."
        return ApiError(404, message, param=self.param, code="model_not_found")


class Targets:
    """Of one server. Only its event loop's thread uses this."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ids: dict[str, int] = {}
        self._num_waiting = 0

    @asynccontextmanager
    async def held(self, model: str | None, lora: Sequence[LoraTerm] = ()) -> AsyncIterator[Target]:
        """What the request names, its adapters in memory while the block runs. 404 for what is not there."""
        engine = self._service.engine
        terms = self._terms(engine, model, lora)
        name = self._service.model_names[0] if model is None else model
        if not terms:
            yield Target(name, engine, None, engine.model.tokenizer)
            return
        adapters = await self._acquired(engine, terms)
        try:
            yield Target(name, engine, adapters, adapters.tokenizer or engine.model.tokenizer)
        finally:
            adapters.release()

    def _terms(self, engine: "Engine", model: str | None, lora: Sequence[LoraTerm]) -> list[_Named]:
        """The adapters that the request names. Names of models win: no adapter may bear one."""
        terms: list[_Named] = []
        if model is not None and model not in self._service.model_names:
            if engine.adapters is None:
                raise model_not_found(model)
            terms.append(_Named(self.adapter_name(model), 1.0, "model", model))
        if lora and engine.adapters is None:
            raise RequestError("lora: this server has no adapters; start it with --enable-lora.", "lora")
        has_numbers = any(isinstance(term.id, int) for term in lora)
        by_number = {number: info.name for number, info in self.listed()} if has_numbers else {}
        for index, term in enumerate(lora):
            name = (
                term.id if isinstance(term.id, str) else by_number.get(term.id, "")
            )  # no adapter has no name
            terms.append(_Named(name, term.scale, f"lora[{index}].id", str(term.id)))
        _check_number(terms, engine.config.max_loras)
        return terms

    async def _acquired(self, engine: "Engine", terms: Sequence[_Named]) -> "AdapterSet":
        library = engine.adapters
        assert library is not None
        try:
            future = library.acquire([(term.name, term.scale) for term in terms])
            return await self._waited(future, engine.config.max_queue)
        except UnknownAdapter:
            present = {info.name for info in library.list()}
            missing = next((term for term in terms if term.name not in present), terms[0])
            raise missing.not_found from None
        except AdapterRefused as error:  # it was fine when it was loaded: no fault of this client's
            logger.warning("%s", error)
            raise unavailable(str(error), "adapter_unreadable") from None

    async def _waited(self, future: "Future[AdapterSet]", limit: int) -> "AdapterSet":
        if future.done():
            return future.result()
        if self._num_waiting >= limit:
            _give_up(future)
            raise QueueFull(f"{limit} requests wait for adapters already; try again later")
        self._num_waiting += 1
        try:
            return await finished(future)
        except asyncio.CancelledError:
            _give_up(future)
            raise
        finally:
            self._num_waiting -= 1

    # for those who ask what there is

    def listed(self) -> "list[tuple[int, AdapterInfo]]":
        """All adapters, each with a number that its name has as long as the server runs; the first to come has 0."""
        library = self._service.engine.adapters
        infos = [] if library is None else library.list()
        for info in infos:
            self._ids.setdefault(info.name, len(self._ids))
        return sorted(((self._ids[info.name], info) for info in infos), key=lambda entry: entry[0])

    def adapter_name(self, model: str) -> str:
        """`base:name` is `name`; names of adapters have no colons, those of models may."""
        base, _, name = model.rpartition(":")
        return name if base in self._service.model_names else model

    def find(self, name: str) -> "tuple[int, AdapterInfo] | None":
        return next((entry for entry in self.listed() if entry[1].name == name), None)

    def parent_of(self, info: "AdapterInfo") -> str:
        """The served model that the adapter belongs to. What the adapter itself says may be a path: not for clients."""
        names = self._service.model_names
        told = info.base_model_name
        return told if told in names else names[0]


async def finished(future: "Future[Result]") -> Result:
    """Its result; other requests go on meanwhile. Who hangs up does not cancel it: others may wait for it, too."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _give_up(future: "Future[AdapterSet]") -> None:
    """Nobody waits for the set any more. Where it comes nevertheless, this very moment, it is not kept."""

    def release(done: "Future[AdapterSet]") -> None:
        if done.exception() is None:
            done.result().release()

    if not future.cancel():
        future.add_done_callback(release)


def _check_number(terms: Sequence[_Named], max_loras: int) -> None:
    """Each adapter once: servers differ in what it means to name one twice."""
    seen: set[str] = set()
    for term in terms:
        if term.name and term.name in seen:
            raise RequestError(f"{term.param}: the request names the adapter {term.name} twice.", term.param)
        seen.add(term.name)
    number = sum(term.scale != 0.0 for term in terms)
    if number > max_loras:
        raise RequestError(
            f"lora: the request names {number} adapters, a step has room for {max_loras} (--max-loras).",
            "lora",
        )
