"""Adapters for tests of the library: real files, small tensors, and reads that can be made to wait."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.models import ModelError
from cadenza.models.adapters.adapter import Adapter, LinearChange, LowRank

SECONDS = 30.0  # no test waits so long unless it fails


class Tracked(Adapter):
    """Can be referred to weakly: it has no slots."""


class Gate:
    """Holds a read up: it has come once `reached` is set, and goes on when `opened` is."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(SECONDS)


class Shelf:
    """Folders with adapters, each of whose contents is made of a number."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_reads: Counter[str] = Counter()
        self.gates: dict[str, Gate] = {}
        self._lock = threading.Lock()

    def write(self, folder: str, number: int) -> str:
        path = self.root / folder
        path.mkdir(exist_ok=True)
        noise = torch.Generator().manual_seed(number)
        tensors = {"a": torch.randn(2, 3, generator=noise), "b": torch.randn(4, 2, generator=noise)}
        save_file(tensors, path / "adapter_model.safetensors")
        return str(path)

    def damage(self, folder: str) -> str:
        (self.root / folder / "adapter_model.safetensors").write_bytes(b"")
        return str(self.root / folder)

    def digest(self, number: int) -> str:
        return self.read_file(Path(self.write("elsewhere", number))).digest

    def gate(self, path: str) -> Gate:
        """The next read of the path waits at it."""
        gate = self.gates[path] = Gate()
        return gate

    def read(self, path: str) -> Adapter:
        with self._lock:
            self.num_reads[path] += 1
            gate = self.gates.pop(path, None)
        if gate is not None:
            gate.pass_through()
        return self.read_file(Path(path))

    @staticmethod
    def read_file(path: Path) -> Adapter:
        try:
            data = (path / "adapter_model.safetensors").read_bytes()
            tensors = load(data)
        except Exception as error:
            raise ModelError("adapter_model.safetensors is no safetensors file") from error
        change = LinearChange(LowRank(tensors["a"], tensors["b"]))
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return Tracked(hashlib.sha256(data).hexdigest(), {"layer": change}, 2, num_bytes)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def make_library(shelf: Shelf) -> Iterator[Callable[..., AdapterLibrary]]:
    """Libraries of the shelf, closed when the test ends."""
    made = []

    def make(**settings: Any) -> AdapterLibrary:
        read = settings.pop("read", shelf.read)
        made.append(AdapterLibrary(read, **{"max_in_memory": 8, "wait_seconds": SECONDS, **settings}))
        return made[-1]

    yield make
    for gate in shelf.gates.values():
        gate.opened.set()
    for library in made:
        library.close()


@pytest.fixture
def make_library_by_hand(
    make_library: Callable[..., AdapterLibrary],
) -> Callable[..., tuple[AdapterLibrary, Callable[[], None]]]:
    """Libraries without threads, each with a function that does all that the loading thread would before it waits."""

    def make(**settings: Any) -> tuple[AdapterLibrary, Callable[[], None]]:
        library = make_library(**settings)
        library._threads.start = lambda: None  # type: ignore[method-assign]

        def work() -> None:
            while True:
                with library._changed:
                    todo = library._threads._next_work()
                if todo is None:
                    return
                todo()

        return library, work

    return make
