"""Processes that start at once on one quantized cache; run by test_store.py, which reads the JSON that this prints.

    python store_workers.py MODEL_FOLDER EMPTY_FOLDER

All are forked from this one, so that torch is imported once. Nothing sleeps: a worker that quantizes waits for the
event that the scenario is about.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from cadenza.models import cache
from cadenza.models.architecture import read_config
from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.errors import ModelError
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.quantization.int8 import Int8

fork = multiprocessing.get_context("fork")


class Watched(Int8):
    """Counts the matrices that it quantizes, and meets the others before matrix number `at`."""

    def __init__(self, at: int = 0, tell: Any = None, wait: Any = None) -> None:
        self.at, self.tell, self.wait = at, tell, wait
        self.count = 0

    def quantize(self, weight: torch.Tensor) -> Any:
        self.count += 1
        if self.count == self.at:
            self.tell.set()
            self.wait.wait()
        return super().quantize(weight)


def load(folder: Path, method: Int8) -> str:
    """The digest of every tensor of the loaded model."""
    source = ModuleSource(
        "tiny",
        folder,
        open_checkpoint(folder, allow_pickle=False),
        LlamaForCausalLM,
        read_config(folder, trust_remote_code=False),
        torch.float32,
        torch.device("cpu"),
        False,
    )
    hasher = hashlib.sha256()
    for name, tensor in load_module(source, method).state_dict().items():
        hasher.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def start(results: Any, root: Path, folder: Path, method: Watched, prepare: Any = None) -> Any:
    """A process that loads and puts [matrices quantized, digest of the model or the error] into `results`."""

    def work() -> None:
        os.environ["CADENZA_CACHE"] = str(root)
        if prepare is not None:
            prepare()
        try:
            outcome = load(folder, method)
        except ModelError as error:
            outcome = f"ModelError: {error}"
        results.put([method.count, outcome])

    process = fork.Process(target=work)
    process.start()
    return process


def together(root: Path, folder: Path) -> Any:
    """The one who quantizes does not go on before the other one waits for it."""
    results, quantizing, waiting = fork.SimpleQueue(), fork.Event(), fork.Event()

    def say(line: str) -> None:
        if line.startswith("Waiting for another process"):
            waiting.set()

    def prepare() -> None:
        cache.say = say

    processes = [start(results, root, folder, Watched(1, quantizing, waiting), prepare) for _ in range(2)]
    outcomes = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return outcomes


def killed(root: Path, folder: Path) -> Any:
    """A process is killed in the middle of writing; what lies there then; a later start, and what lies there then."""
    results, reached, never = fork.SimpleQueue(), fork.Event(), fork.Event()
    process = start(results, root, folder, Watched(5, reached, never))
    reached.wait()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = names(root)
    start(results, root, folder, Watched()).join()
    return {"left": left, "later": results.get(), "then": names(root)}


def full(root: Path, folder: Path) -> Any:
    """No file can grow beyond 50,000 bytes, as on a disk that is full in the middle."""
    results = fork.SimpleQueue()

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    start(results, root, folder, Watched(), prepare).join()
    return {"outcome": results.get(), "then": names(root)}


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in (root / "quantized").iterdir())


if __name__ == "__main__":
    model, empty = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    scenarios = (together, killed, full)
    print(
        json.dumps({scenario.__name__: scenario(empty / scenario.__name__, model) for scenario in scenarios})
    )
