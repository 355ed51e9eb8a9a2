"""An engine's library of adapters, and those that are there from the start.

The latter are the operator's own: they may come from anywhere.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary
from cadenza.decoding.adapters.module import LoraModule
from cadenza.decoding.adapters.runtime import AdapterRuntime
from cadenza.decoding.adapters.weights import Call, EngineWeights
from cadenza.decoding.config import EngineConfig
from cadenza.decoding.request import EngineClosed, RequestError
from cadenza.models import LoadedModel
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.locate import locate_trusted
from cadenza.models.adapters.read import read_adapter
from cadenza.models.errors import ModelError


def open_library(
    runtime: AdapterRuntime, call: Call[Any], model: LoadedModel, config: EngineConfig
) -> AdapterLibrary:
    """call: runs a function on the engine's thread, where the model computes."""
    weights = EngineWeights(runtime.weights, runtime.layout, call)

    def read(path: str) -> Adapter:
        return read_adapter(
            Path(path),
            runtime.layout,
            weights,
            model.tokenizer,
            max_rank=config.max_lora_rank,
            fingerprint=model.fingerprint,
        )

    def warm(adapter: Adapter) -> None:
        call(partial(runtime.warm, adapter)).result()

    def forget(digest: str) -> None:
        with suppress(EngineClosed):
            call(partial(runtime.slots.forget, digest))

    return AdapterLibrary(read, max_in_memory=config.adapters_in_memory, warm=warm, forget=forget)


def load_modules(library: AdapterLibrary, modules: Sequence[LoraModule]) -> None:
    """In the order in which they are named; returns when all are loaded. Raises ModelError, naming the adapter."""
    for module, future in [(module, _loading(library, module)) for module in modules]:
        try:
            future.result()
        except (ModelError, RequestError) as error:
            raise ModelError(f"adapter {module.name}: {error}") from error


def _loading(library: AdapterLibrary, module: LoraModule) -> "Future[AdapterInfo]":
    try:
        path = str(locate_trusted(module.path))
    except ModelError as error:
        raise ModelError(f"adapter {module.name}: {error}") from error
    return library.load(module.name, path, base_model_name=module.base_model_name)
