"""The adapters that are there from the start. They are the operator's own: they may come from anywhere."""

from collections.abc import Sequence
from concurrent.futures import Future

from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary
from cadenza.decoding.adapters.module import LoraModule
from cadenza.decoding.request import RequestError
from cadenza.models.adapters.locate import locate_trusted
from cadenza.models.errors import ModelError


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
