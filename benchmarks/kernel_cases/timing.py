"""How long a function takes, on a GPU and on a CPU; how fast this GPU copies; what an empty launch takes.

A GPU's times are those between two events, with the second-level cache overwritten before each repetition. The GPU is
kept busy until the host has launched everything, so that what is measured is the GPU's time and not the host's; a
function that waits for the device midway has its host's time counted from there on. The host's own time is measured
separately. Everything is bounded: repetitions are as many as a budget allows.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

Function = Callable[[], Any]
FLUSHED_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU of today."""
COPIED_BYTES = 2**30
_CLOCK = 2e9
"""Cycles per second, about: how long the GPU is kept waiting need not be exact."""


class Spread(NamedTuple):
    """Microseconds."""

    first_quartile: float
    median: float
    third_quartile: float
    host: float
    """What the calling thread took, median."""
    repetitions: int

    @classmethod
    def of(cls, seconds: list[float], host: list[float]) -> "Spread":
        own = sorted(1e6 * each for each in seconds)
        low, middle, high = statistics.quantiles(own, n=4, method="inclusive") if own[1:] else own * 3
        return cls(low, middle, high, 1e6 * statistics.median(host), len(own))


class Timer(Protocol):
    def __call__(self, function: Function) -> Spread: ...


class CpuTimer:
    """For a benchmark's test: whatever runs on this thread."""

    def __init__(self, repetitions: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self._repetitions, self._clock = repetitions, clock

    def __call__(self, function: Function) -> Spread:
        times = []
        for _ in range(self._repetitions):
            start = self._clock()
            function()
            times.append(self._clock() - start)
        return Spread.of(times, times)


class CudaTimer:
    def __init__(self, device: torch.device, *, budget: float, most: int, least: int = 5) -> None:
        """budget: seconds for one function's repetitions."""
        self._budget, self._most, self._least = budget, most, least
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Function) -> Spread:
        function()  # compiles
        torch.cuda.synchronize()
        host, trials = [], []
        for _ in range(3):
            start = time.perf_counter()
            function()
            host.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            trials.append(time.perf_counter() - start)
        once = min(trials)
        # What a repetition takes besides: the flush, about 0.1 ms, and the wait.
        wait = min(2e-3, 2 * statistics.median(host) + 50e-6)
        count = int(self._budget / (once + wait + 1e-4))
        count = max(self._least if once < 0.2 else 3, min(self._most, count))
        events = []
        for _ in range(count):
            self._flushed.zero_()
            torch.cuda._sleep(int(wait * _CLOCK))
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            function()
            end_event.record()
            events.append((start_event, end_event))
        torch.cuda.synchronize()
        return Spread.of([start.elapsed_time(end) / 1e3 for start, end in events], host)


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Bytes per second, what is read and what is written counted together."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (timer(lambda: target.copy_(source)).median / 1e6)


def launch_overhead(timer: Timer) -> Spread:
    """Of a kernel that does nothing."""
    from kernel_cases.empty_kernel import launch

    return timer(launch)
