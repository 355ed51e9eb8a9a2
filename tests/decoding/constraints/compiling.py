"""What tests of the compiler ask its worker processes for, and ask of them."""

import os
from collections.abc import Callable
from concurrent.futures import Future

from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.decoding.constraints.worker_process import WorkerProcess

WORDS = [b"true", b"false", b'":', b'{"', b"12", b"ab", b"hello", b"\xf0\x9f", b"\n\n"]
VOCABULARY = Vocabulary([bytes([byte]) for byte in range(256)] + WORDS + [b""], [256 + len(WORDS)])
WAIT = 60.0
Make = Callable[..., ConstraintCompiler]


def spec(number: int) -> ConstraintSpec:
    return ConstraintSpec.regex(f"[a-z]{{{number + 1}}}")


def error_of(future: "Future[Constraint]") -> BaseException | None:
    return future.exception(WAIT)


def only_worker(compiler: ConstraintCompiler) -> WorkerProcess:
    """Started, and at rest."""
    compiler.compile(spec(900)).result(WAIT)
    return compiler._workers[-1]


def is_gone(pid: int) -> bool:
    """Neither running nor waiting to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
