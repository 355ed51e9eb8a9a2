"""From typing the command to the first token: a whole process each time, imports included.

    python benchmarks/startup.py [--model smollm2] [--rounds 5] [--precisions float32 int8 int4 …]

This measures the second start: one that is not counted fetches the model and quantizes it. Rounds take precisions in
turn, so that a slow minute hits all of them alike. The server's own report of where the time went is shown for the
median round of the first precision.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

BIN = Path(sys.executable).parent
PRECISIONS = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "float16": ["--dtype", "float16"],
    **{name: ["--quantization", name] for name in ("int8", "int4", "nf4", "fp8", "llm-int8")},
}


def start_once(model: str, precision: str) -> tuple[float, float, str]:
    """Seconds until the server answers /health with 200, and until the first token; its report."""
    begin = time.perf_counter()
    command = [str(BIN / "cadenza"), "serve", model, "--port", "0", *PRECISIONS[precision]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        report = []
        for line in process.stdout:
            report.append(line)
            if line.startswith("ready"):
                break
        else:
            raise SystemExit("the server ended before it was ready")
        ready = time.perf_counter() - begin
        body = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
        httpx.post(f"{report[-1].split()[1]}/completions", json=body, timeout=60).raise_for_status()
        return ready, time.perf_counter() - begin, "".join(report)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["float32"])
    options = parser.parse_args()
    for precision in options.precisions:
        start_once(options.model, precision)
    found: dict[str, list[tuple[float, float, str]]] = {precision: [] for precision in options.precisions}
    for _ in range(options.rounds):
        for precision, starts in found.items():
            starts.append(start_once(options.model, precision))
    first = sorted(found[options.precisions[0]], key=lambda start: start[1])
    print(first[len(first) // 2][2])
    for precision, starts in found.items():
        ready, token = ([start[part] for start in starts] for part in (0, 1))
        print(
            f"{precision:9} ready {statistics.median(ready):.2f} s, first token {statistics.median(token):.2f} s"
            f" ({min(token):.2f} to {max(token):.2f}; median of {len(starts)})"
        )


if __name__ == "__main__":
    main()
