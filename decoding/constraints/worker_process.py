"""The parent's end of a worker process: start it, ask it, end it when it is late."""

import contextlib
import os
import subprocess
import sys
import threading
from typing import Any

from cadenza.decoding.constraints.compiled import Compiled
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.pipes import Reader, send
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

_START_SECONDS = 60.0
_LATE_SECONDS = 20.0  # elapsed; the worker's own limit is on processor time, and much shorter


class NoAnswer(ConstraintTooComplex):
    """The process was late or has died: most likely the constraint's fault, but perhaps the machine's, which may do
    better another time."""


class WorkerProcess:
    """One question at a time. Raises RuntimeError where the process cannot be started."""

    def __init__(self, vocabularies: tuple[Vocabulary, Vocabulary], limits: Limits) -> None:
        self._limits = limits
        self._in_use = threading.RLock()
        """Held by who reads and writes the pipes: they are not closed under their hands."""
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "RAYON")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cadenza.decoding.constraints.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads},
            start_new_session=True,  # an interrupt from the keyboard is for the server, which then ends the workers
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions = self._process.stdin
        self._answers = Reader(self._process.stdout.fileno())
        try:
            send(self._questions, (vocabularies, limits))
            self._answers.receive(_START_SECONDS)
        except (EOFError, OSError) as error:  # a timeout is an OSError
            self.kill()
            raise RuntimeError("the process that compiles constraints does not start") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, spec: ConstraintSpec) -> tuple[Compiled, int]:
        """What the constraint compiles to, and its size in bytes. Raises what the worker answers with, or NoAnswer."""
        with self._in_use:
            answer, size = self._answer(spec)
        if isinstance(answer, Exception):
            raise answer
        return answer, size

    def _answer(self, spec: ConstraintSpec) -> tuple[Any, int]:
        try:
            send(self._questions, spec)
            (answer, is_last), size = self._answers.receive(_LATE_SECONDS)
        except TimeoutError:
            self.kill()
            raise NoAnswer(f"the constraint took longer than {_LATE_SECONDS} seconds to compile") from None
        except (
            EOFError,
            OSError,
            ValueError,
        ):  # it has died, or was ended: what is closed has the value error
            self.kill()
            limit = self._limits.max_memory_bytes // 2**20
            raise NoAnswer(f"the constraint cannot be compiled within {limit} MiB of memory") from None
        if is_last:
            self.kill()
        return answer, size

    def kill(self) -> None:
        """From any thread; who waits for an answer gets NoAnswer."""
        self._process.kill()
        with self._in_use:
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
