"""The parent's end of a worker process: start it, ask it, end it when it is late."""

import contextlib
import os
import subprocess
import sys

from cadenza.decoding.constraints.compiled import Compiled
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.pipes import Reader, send
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

_START_SECONDS = 60.0
_LATE_SECONDS = 20.0  # elapsed; the worker's own limit is on processor time, and much shorter


class WorkerProcess:
    """One question at a time. Raises RuntimeError where the process cannot be started."""

    def __init__(self, vocabularies: tuple[Vocabulary, Vocabulary], limits: Limits) -> None:
        self._limits = limits
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "RAYON")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cadenza.decoding.constraints.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions = self._process.stdin
        self._answers = Reader(self._process.stdout.fileno())
        send(self._questions, (vocabularies, limits))
        self._answers.receive(_START_SECONDS)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, spec: ConstraintSpec) -> tuple[Compiled, int]:
        """What the constraint compiles to, and its size in bytes. Raises what the worker answers with."""
        try:
            send(self._questions, spec)
            answer, size = self._answers.receive(_LATE_SECONDS)
        except TimeoutError:
            self.kill()
            raise ConstraintTooComplex(
                f"the constraint took longer than {_LATE_SECONDS} seconds to compile"
            ) from None
        except (EOFError, BrokenPipeError):
            self.kill()
            limit = self._limits.max_memory_bytes // 2**20
            raise ConstraintTooComplex(
                f"the constraint cannot be compiled within {limit} MiB of memory"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer, size

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
