"""The process that measures, and how the one that waits for it asks: a task a line in, an answer a line out.

A kernel that never returns, or one that breaks the GPU's context, ends this process alone: the next task has a new one.
"""

import ast
import gc
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from kernel_cases.case import Case
from kernel_cases.measure import Row
from kernel_cases.timing import Timer

START_SECONDS = 120.0
Setting = tuple[str, str, str, str]
"""(file of kernels/, its constant, key of the entry or "None", value), the latter two as Python writes them."""


class Workers:
    """One at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, for as long as there are processes

    def ask(self, task: Row, seconds: float) -> Row:
        """The answer, or {"error": why there is none}."""
        if self._process is None:
            self._start()
            started = self._answer(START_SECONDS)
            if "error" in started:
                self.close()
                return started
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: so the answer says
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        answer = self._answer(seconds)
        if answer.pop("is_over", False):
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(OSError):  # a task that was never read
                    pipe.close()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _answer(self, seconds: float) -> Row:
        try:
            line = self._lines.get(timeout=max(0.1, seconds))
        except queue.Empty:
            return {"error": f"no answer in {seconds:.0f} s", "is_over": True}
        if not line:
            return {"error": f"the process ended. {self._last_line()}", "is_over": True}
        answer: Row = json.loads(line)
        return answer

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1][:200] if lines else ""


def worker_main(*, is_quick: bool) -> None:
    """Answers until there are no more tasks."""
    # Only answers go to the standard output, whatever compilers print.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from kernel_cases.case import Sizes
    from kernel_cases.measure import all_cases, text_of
    from kernel_cases.timing import CudaTimer

    device = torch.device("cuda", torch.cuda.current_device())
    timer = CudaTimer(device, budget=0.03 if is_quick else 0.1, most=30 if is_quick else 100)
    cases = {case.name: case for case in all_cases(Sizes())}
    print(json.dumps({}), file=out, flush=True)
    for line in sys.stdin:
        answer = answer_to(json.loads(line), cases, device, timer)
        try:
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        except Exception as error:  # of the GPU's context, which is of no more use
            answer = {**answer, "error": text_of(error), "is_over": True}
        print(json.dumps(answer), file=out, flush=True)


def answer_to(task: Row, cases: Mapping[str, Case], device: torch.device, timer: Timer) -> Row:
    from kernel_cases import measure
    from kernel_cases.timing import copy_bandwidth, launch_overhead

    verbs = {
        "measure": measure.measure,
        "libraries": measure.measure_libraries,
        "compiled": measure.measure_compiled,
        "settings": measure.run_settings,
    }
    try:
        if task["verb"] == "machine":
            launch = launch_overhead(timer)._asdict()
            return {**machine(), "copy_bandwidth": copy_bandwidth(device, timer), "launch": launch}
        with settings_in_place(task.get("settings", [])):
            return verbs[task["verb"]](cases[task["case"]], device, timer)
    except Exception as error:
        return {"error": measure.text_of(error)}


@contextmanager
def settings_in_place(settings: Sequence[Sequence[str]]) -> Iterator[None]:
    before: list[tuple[Any, str, Any]] = []
    try:
        for file, name, key, value in settings:
            module = importlib.import_module(f"cadenza.kernels.{file}")
            table, entry = getattr(module, name), ast.literal_eval(key)
            before.append((module, name, table))
            own = ast.literal_eval(value)
            setattr(module, name, own if entry is None else {**table, entry: own})
            _forget(module)
        yield
    finally:
        for module, name, table in reversed(before):
            setattr(module, name, table)
            _forget(module)


def _forget(module: Any) -> None:
    """What a module has cached may have been made of its constants."""
    for function in vars(module).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def machine() -> Row:
    import triton

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip().partition("\n")[0]
        except (OSError, subprocess.SubprocessError):
            return ""

    here = os.path.dirname(os.path.abspath(__file__))
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": said("git", "-C", here, "describe", "--always", "--dirty"),
    }
