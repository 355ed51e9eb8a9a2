"""One case measured: what its kernel gives is compared first, then everything is timed. Rows are plain dictionaries.

Whatever fails becomes the text of its own column: neither the row nor the run ends.
"""

import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from kernel_cases import attention, layers, products, sampling, speculation
from kernel_cases.case import Case, Function, Sizes, Work, Wrong, compare
from kernel_cases.timing import Timer

Row = dict[str, Any]
LIBRARIES = ("flashinfer", "vllm")
COMPILE_SECONDS = 20
_LENGTH = 200


def all_cases(sizes: Sizes) -> list[Case]:
    parts = (sampling, speculation, attention, layers, products)
    return [case for part in parts for case in part.cases(sizes)]


def chosen(cases: Sequence[Case], only: Sequence[str], *, is_quick: bool) -> list[Case]:
    """Those whose name begins with any of `only`; all of them, if there is none."""
    wanted = [case for case in cases if not only or case.name.startswith(tuple(only))]
    return [case for case in wanted if case.is_quick or not is_quick]


def measure(case: Case, device: torch.device, timer: Timer) -> Row:
    """The kernel, its reference and the usual torch."""
    try:
        work = case.make(device)
    except Exception as error:
        return {"error": text_of(error)}
    row: Row = {"bytes": work.num_bytes, "flops": work.num_flops, "columns": {}}
    try:
        row["difference"] = compare(work)
    except Wrong as wrong:
        row["wrong"] = str(wrong)
    except Exception as error:
        row["error"] = text_of(error)
    if "error" not in row:
        row["columns"]["kernel"] = _timed(timer, work.kernel)
    row["columns"]["reference"] = _timed(timer, work.reference)
    if work.usual is not None:
        row["columns"]["usual"] = _timed(timer, work.usual)
    return row


def measure_libraries(case: Case, device: torch.device, timer: Timer) -> Row:
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if not installed:
        return {"columns": {}}
    work = case.make(device)
    makers = {name: work.libraries[name] for name in installed if name in work.libraries}
    return {"columns": {name: _timed(timer, None, make) for name, make in makers.items()}}


def measure_compiled(case: Case, device: torch.device, timer: Timer) -> Row:
    """torch.compile of the reference."""
    work = case.make(device)

    def make() -> Function:
        torch._dynamo.reset()
        compiled: Function = torch.compile(work.reference, dynamic=False)
        with _at_most(COMPILE_SECONDS):
            compiled()
        return compiled

    return {"columns": {"compiled": _timed(timer, None, make)}}


def run_settings(case: Case, device: torch.device, timer: Timer) -> Row:
    """For a sweep: the kernel alone, which has to be right."""
    work: Work = case.make(device)
    compare(work)
    return {"columns": {"kernel": _timed(timer, work.kernel)}}


def _timed(
    timer: Timer, function: Function | None, make: Callable[[], Function] | None = None
) -> dict[str, float | str]:
    try:
        if make is not None:
            function = make()
        assert function is not None
        return timer(function)._asdict()
    except Exception as error:
        return {"error": text_of(error)}


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, unless it is not Python's to interrupt: every second anew, because
    torch's compilers may take the first for a failure of theirs that they can do without."""
    is_late = False

    def stop(*_: object) -> None:
        nonlocal is_late
        is_late = True
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except Exception as error:
        if is_late:
            raise TimeoutError(f"more than {seconds} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def text_of(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:_LENGTH].removesuffix(": ")
