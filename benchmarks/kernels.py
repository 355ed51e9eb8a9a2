"""Each kernel of kernels/ on this machine's GPU, against its floor, its torch reference and others.

    python benchmarks/kernels.py                            # everything, within eight minutes
    python benchmarks/kernels.py --quick --json rows.json   # the largest shapes alone, within two
    python benchmarks/kernels.py --only fused_sampling "decode_attention: 32"
    python benchmarks/kernels.py --sweep rms_norm           # launch configurations for the shapes, to check in

floor       what memory must move (each kernel's own `..._bytes`) over the bandwidth of a copy of 1 GiB on this GPU,
            read and written; what a launch takes is measured with an empty kernel and said separately
kernel      compared with its reference first; a result that is wrong is said to be, and its time is shown all the same
host        what the calling thread takes to launch it
reference   the same in plain torch, in the dtype that is served, where it has one
usual       what people write in torch: the sampler that sorts, cuBLAS with a dense weight, attention without a table
compiled    torch.compile of the reference, once for each kind of case; after all others, and bounded
flashinfer, vllm   their kernels, where they are installed

Shapes are those of Llama-8B in bfloat16. Times are of the GPU, between events, with the cache overwritten before each
repetition: medians with quartiles. Measuring happens in a process of its own, so that a kernel that hangs or breaks the
GPU's context is a row with its error. Targets that have been set are marked PASS or MISS.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__version__ = "0"
"""This folder comes first on the path of its scripts, and transformers asks there for Hugging Face's package `kernels`:
a version of 0 is one that it does not use."""

Row = dict[str, Any]
PASSES = {"measure": 60.0, "libraries": 60.0, "compiled": 40.0}
"""What is measured, one after the other, with the seconds that a case may take."""
RESERVE = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from kernel_cases.worker import Workers, worker_main

    if options.worker:
        worker_main(is_quick=options.quick)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU that torch can use here, and nothing else is measured", file=sys.stderr)
        return 2
    command = [sys.executable, __file__, "--worker", *(["--quick"] if options.quick else [])]
    workers = Workers(command)
    try:
        return sweep(options, workers) if options.sweep else measure(options, workers)
    finally:
        workers.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, too; written again after each pass")
    parser.add_argument("--sweep", metavar="KERNEL", help="tries launch configurations instead")
    parser.add_argument("--minutes", type=float, help="when to stop; 8, or 2 with --quick")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = 2.0 if options.quick else 8.0
    return options


def measure(options: argparse.Namespace, workers: Any, clock: Callable[[], float] = time.perf_counter) -> int:
    """The exit status: 0 if every kernel ran and was right."""
    from kernel_cases import report
    from kernel_cases.case import Sizes
    from kernel_cases.measure import all_cases, chosen
    from rich.console import Console

    begin = clock()
    deadline = begin + 60 * options.minutes - RESERVE
    cases = chosen(all_cases(Sizes()), options.only, is_quick=options.quick)
    if not cases:
        print("no case has such a name", file=sys.stderr)
        return 2
    machine = workers.ask({"verb": "machine"}, 60.0)
    if "error" in machine:
        print(machine["error"], file=sys.stderr)
        return 1
    rows: dict[str, Row] = {case.name: {"name": case.name, "kernel": case.kernel} for case in cases}
    for verb, seconds in PASSES.items():
        if verb != "measure" and options.quick:
            continue
        for case in cases:
            if verb == "compiled" and not case.is_compiled:
                continue
            say(f"{clock() - begin:6.1f} s  {verb} {case.name}")
            left = deadline - clock()
            answer = {"error": report.NO_TIME}
            if left > 0:
                answer = workers.ask({"verb": verb, "case": case.name}, min(seconds, left))
            merge(rows[case.name], verb, answer)
            report.finish(rows[case.name], case, machine["copy_bandwidth"])
        if options.json:
            options.json.write_text(json.dumps({**machine, "rows": list(rows.values())}, indent=1))
    console = Console(width=report.WIDTH)
    report.show(console, list(rows.values()), machine)
    say(f"{clock() - begin:6.1f} s")
    return int(any("error" in row or "wrong" in row for row in rows.values()))


def merge(row: Row, verb: str, answer: Row) -> None:
    """Only what belongs to the kernel itself is an error of the row."""
    columns = {**row.get("columns", {}), **answer.pop("columns", {})}
    if verb != "measure" and "error" in answer:
        columns.setdefault("compiled" if verb == "compiled" else "flashinfer", {"error": answer.pop("error")})
    row.update(answer, columns=columns)


def sweep(options: argparse.Namespace, workers: Any, clock: Callable[[], float] = time.perf_counter) -> int:
    from kernel_cases import sweeps
    from kernel_cases.case import Sizes
    from kernel_cases.measure import all_cases, chosen

    if options.sweep not in sweeps.SWEEPS:
        print(f"there are tables of {', '.join(sweeps.SWEEPS)}", file=sys.stderr)
        return 2
    deadline = clock() + 60 * options.minutes - RESERVE
    cases = chosen(all_cases(Sizes()), [f"{options.sweep}:"], is_quick=options.quick)

    def ask(name: str, settings: list[tuple[str, str, str, str]]) -> Row:
        row: Row = workers.ask({"verb": "settings", "case": name, "settings": settings}, 40.0)
        return row

    lines = sweeps.run(
        sweeps.SWEEPS[options.sweep], [case.name for case in cases], ask, say, lambda: clock() < deadline
    )
    print("\n".join(lines))
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
