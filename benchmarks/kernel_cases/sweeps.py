"""Which launch configurations a sweep tries, and what it prints: lines to check in by hand.

Tables are constants in the kernels' files; nothing is tuned when a server starts. Entries are improved one after the
other, each with the best of those before, by the geometric mean over the kernel's cases. Some constants decide the
order of summation: a change of those is a change of a result's last bits, which their files say.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernel_cases.measure import Row
from kernel_cases.worker import Setting

Entry = Any
Ask = Callable[[str, list[Setting]], Row]
"""(name of a case, settings) to its row."""


@dataclass(frozen=True, slots=True)
class Sweep:
    file: str
    constant: str
    key: Entry = None
    """Of the constant, where that is a table; None: the constant itself."""
    candidates: Callable[[Entry], Iterable[Entry]] = lambda value: options(value)
    cases: tuple[str, ...] = ("",)
    """What follows a case's kernel in its name, to begin with."""

    @property
    def current(self) -> Entry:
        table = getattr(importlib.import_module(f"cadenza.kernels.{self.file}"), self.constant)
        return table if self.key is None else table[self.key]

    def setting(self, value: Entry) -> Setting:
        return self.file, self.constant, repr(self.key), repr(value)

    def line(self, value: Entry) -> str:
        at = "" if self.key is None else f"[{self.key!r}]"
        return f"kernels/{self.file}.py: {self.constant}{at} = {value!r}"


def options(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of warps half, as many and double; stages where there is a pipeline."""
    stages = (1,) if value["num_stages"] == 1 else (2, 3, 4, 5)
    for num_warps in _around(value["num_warps"]):
        for num_stages in stages:
            yield {**value, "num_warps": num_warps, "num_stages": num_stages}


def numbers(value: int) -> Iterator[int]:
    yield from (value // 2, value, 2 * value, 4 * value)


def triples(value: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """(keys per block, warps, stages) of prefill attention; blocks divide a tile of 64."""
    for block in (16, 32, 64):
        for num_warps in (4, 8):
            for num_stages in (2, 3, 4):
                yield block, num_warps, num_stages


def _around(num_warps: int) -> tuple[int, ...]:
    return tuple(count for count in (num_warps // 2, num_warps, 2 * num_warps) if 1 <= count <= 32)


SWEEPS = {
    "fused_sampling": [Sweep("fused_sampling", "BLOCKS_OPTIONS"), Sweep("fused_sampling", "CHOOSE_OPTIONS")],
    "top_tokens": [Sweep("top_tokens", "SCAN_OPTIONS"), Sweep("top_tokens", "PICK_OPTIONS")],
    "logit_edits": [
        Sweep("logit_edits", "COPY_BLOCK", candidates=numbers),
        Sweep("logit_edits", "COPY_OPTIONS"),
        Sweep("logit_edits", "SCATTER_OPTIONS"),
    ],
    "decode_attention": [
        Sweep("decode_attention", "LOOP_BYTES", candidates=lambda value: (value // 2, 2 * value)),
        Sweep("decode_attention", "OPTIONS"),
        Sweep("decode_attention", "MERGE_OPTIONS"),
    ],
    "prefill_attention": [Sweep("prefill_attention", "CONFIGS", (2, 128, 2), triples)],
    "kv_write": [
        # Eight heads of 128: above these it is the warps and heads there are that decide.
        Sweep("kv_write", "MAX_ELEMENTS", candidates=lambda value: (128, 256, 512)),
        Sweep("kv_write", "MAX_WARPS", candidates=lambda value: (1, 2)),
    ],
    "rms_norm": [Sweep("rms_norm", "WARPS", 4096, _around)],
    "rotary": [Sweep("rotary", "TILE", candidates=numbers), Sweep("rotary", "OPTIONS")],
    "gated_activation": [
        Sweep("gated_activation", "BLOCK", candidates=numbers),
        Sweep("gated_activation", "OPTIONS"),
    ],
    "hadamard": [Sweep("hadamard", "_OPTIONS")],
    "lora_sgmv": [
        Sweep("lora_sgmv", "SHRINK_OPTIONS", cases=("shrink",)),
        Sweep("lora_sgmv", "EXPAND_BLOCK", candidates=numbers, cases=("expand",)),
        Sweep("lora_sgmv", "EXPAND_OPTIONS", cases=("expand",)),
    ],
    "int8_matmul": [Sweep("int8_matmul", "_OPTIONS", 2)],
    "int4_matmul": [Sweep("int4_matmul", "_OPTIONS", 2)],
    "verification": [
        Sweep("verification", "BLOCK", candidates=numbers),
        Sweep("verification", "OPTIONS"),
    ],
}


def run(
    sweeps: Sequence[Sweep],
    names: Sequence[str],
    ask: Ask,
    say: Callable[[str], None],
    has_time: Callable[[], bool],
) -> list[str]:
    """Lines to check in. names: of the kernel's cases."""
    best_settings: list[Setting] = []
    lines = []
    for sweep in sweeps:
        own = [name for name in names if name.partition(": ")[2].startswith(sweep.cases)]
        current = sweep.current
        values = [current, *(value for value in sweep.candidates(current) if value != current)]
        best, best_score, base = current, math.inf, math.inf
        for value in values:
            if not has_time():
                say(
                    f"no time was left after {values.index(value)} of {len(values)} values of {sweep.constant}"
                )
                break
            score = _score(own, [*best_settings, sweep.setting(value)], ask, say)
            say(f"{score:10.2f} µs  {sweep.line(value)}")
            if value == current:
                base = score
            if score < best_score:
                best, best_score = value, score
        best_settings.append(sweep.setting(best))
        lines.append(f"{sweep.line(best)}    # {best_score:.2f} µs, now {base:.2f}")
    return lines


def _score(names: Sequence[str], settings: list[Setting], ask: Ask, say: Callable[[str], None]) -> float:
    """The geometric mean of medians; infinite where any case fails or is wrong."""
    logarithms = []
    for name in names:
        row = ask(name, settings)
        column = row.get("columns", {}).get("kernel", {})
        if "median" not in column:
            say(f"  {name}: {row.get('error') or column.get('error')}")
            return math.inf
        logarithms.append(math.log(column["median"]))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.inf
