"""The worker process that compiles constraints: `python -m cadenza.decoding.constraints.worker`.

A process of its own, because compiling is Python that would take the interpreter from the engine's thread, and
because only a process can be bounded in memory and ended at a deadline whatever it is doing. It reads from
standard input (vocabularies and limits, then one specification after another) and answers on standard output.
"""

import os
from typing import Any

from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.pipes import Reader, send
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

_NICENESS = 10  # the tokens of running requests go first


def main() -> None:
    # standard output is for answers alone: whatever a library prints goes to standard error
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    questions = Reader(0)
    (vocabularies, limits), _ = questions.receive()
    for vocabulary in vocabularies:
        vocabulary.prepare()  # what all compilations share, before memory is limited
    _limit_memory(limits.max_memory_bytes)
    send(answers, None)
    while True:
        try:
            spec, _ = questions.receive()
        except EOFError:
            return
        send(answers, _answer(spec, vocabularies[spec.kind == "structural_tag"], limits))


def _answer(spec: ConstraintSpec, vocabulary: Vocabulary, limits: Limits) -> Any:
    try:
        return compile_spec(spec, vocabulary, Effort(limits))
    except ConstraintError as error:
        return error
    except MemoryError:
        limit = limits.max_memory_bytes // 2**20
        return ConstraintTooComplex(f"the constraint needs more than {limit} MiB to compile")
    except Exception as error:  # a defect of ours: this one request hears of it, and no other
        return RuntimeError(f"compiling the constraint failed: {type(error).__name__}: {error}")


def _limit_memory(extra: int) -> None:
    """Let the process grow by `extra` bytes of memory of its own; beyond that, MemoryError."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as statm:
            num_pages = int(statm.read().split()[5])
    except (ImportError, OSError):  # only Linux tells how much a process has; elsewhere the deadline must do
        return
    limit = num_pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
