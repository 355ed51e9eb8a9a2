"""The worker process that compiles constraints: `python -m cadenza.decoding.constraints.worker`.

A process of its own, because compiling is Python that would take the interpreter from the engine's thread, and
because only a process can be bounded in memory and ended at a deadline whatever it is doing. It reads from
standard input (vocabularies and limits, then one specification after another) and answers on standard output.
"""

import copy
import gc
import os
from collections.abc import Callable
from typing import Any

from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort, Limits
from cadenza.decoding.constraints.pipes import Reader, send
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

_NICENESS = 10  # the tokens of running requests go first
_RESERVE_BYTES = 50 * 1024 * 1024
"""Beyond the limit that `Effort` watches: where even that is not enough, allocations fail."""


def main() -> None:
    # standard output is for answers alone: whatever a library prints goes to standard error
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    questions = Reader(0)
    (vocabularies, limits), _ = questions.receive()
    for vocabulary in vocabularies:
        vocabulary.prepare()  # what all compilations share, before memory is limited
    memory_used = _limited_memory(limits.max_memory_bytes + _RESERVE_BYTES)
    send(answers, None)
    while True:
        try:
            spec, _ = questions.receive()
        except EOFError:
            return
        effort = Effort(limits, memory_used=memory_used)
        answer = _answer(spec, vocabularies[spec.kind == "structural_tag"], effort)
        send(answers, (answer, _keeps_too_much(memory_used, limits)))
        del answer


def _answer(spec: ConstraintSpec, vocabulary: Vocabulary, effort: Effort) -> Any:
    try:
        return compile_spec(spec, vocabulary, effort)
    except ConstraintError as error:
        return copy.copy(error)  # without the stack, which holds on to all that there was
    except MemoryError:
        limit = effort.limits.max_memory_bytes // 2**20
        return ConstraintTooComplex(f"the constraint needs more than {limit} MiB to compile")
    except Exception as error:  # a defect of ours: this one request hears of it, and no other
        return RuntimeError(f"compiling the constraint failed: {type(error).__name__}: {error}")


def _keeps_too_much(memory_used: Callable[[], int], limits: Limits) -> bool:
    """Whether this is to be the last answer: what a large constraint left behind would be missing for all others."""
    if memory_used() > limits.max_memory_bytes // 2:
        gc.collect()
    return memory_used() > limits.max_memory_bytes // 2


def _limited_memory(extra: int) -> Callable[[], int]:
    """Let the process grow by `extra` bytes of memory of its own; beyond that, MemoryError. Tells how much it has
    grown."""
    try:
        import resource

        statm = os.open("/proc/self/statm", os.O_RDONLY)
    except (
        ImportError,
        OSError,
    ):  # only Linux tells how much a process has; elsewhere time is all that is limited
        return lambda: 0
    page_size = resource.getpagesize()

    def held() -> int:
        return int(os.pread(statm, 256, 0).split()[5]) * page_size

    before = held()
    resource.setrlimit(resource.RLIMIT_DATA, (before + extra, before + extra))
    return lambda: held() - before


if __name__ == "__main__":
    main()
