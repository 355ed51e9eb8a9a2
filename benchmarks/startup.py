"""From typing the command to the first token: a whole process each time, imports included.

    python benchmarks/startup.py [--model smollm2] [--rounds 5]

The model must have been fetched before: this measures the second start. The server's own report of where the time
went is shown for the median round.
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


def start_once(model: str) -> tuple[float, float, str]:
    """Seconds until the server answers /health with 200, and until the first token; its report."""
    begin = time.perf_counter()
    command = [str(BIN / "cadenza"), "serve", model, "--port", "0"]
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
    options = parser.parse_args()
    rounds = sorted((start_once(options.model) for _ in range(options.rounds)), key=lambda round: round[1])
    print(rounds[len(rounds) // 2][2])
    print(f"ready        {statistics.median(round[0] for round in rounds):.2f} s (median of {len(rounds)})")
    print(
        f"first token  {statistics.median(round[1] for round in rounds):.2f} s"
        f" ({rounds[0][1]:.2f} to {rounds[-1][1]:.2f})"
    )


if __name__ == "__main__":
    main()
