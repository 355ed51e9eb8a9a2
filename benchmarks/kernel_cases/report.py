"""The table: each row beside its floor, its reference and the others, with the targets that are set."""

from collections.abc import Sequence
from typing import Any

from kernel_cases.case import Case, Target
from kernel_cases.measure import LIBRARIES, Row
from rich.console import Console
from rich.table import Table

OTHERS = ("reference", "usual", "compiled", *LIBRARIES)
WIDTH = 190


def finish(row: Row, case: Case, bandwidth: float) -> Row:
    """Adds what follows from the measurements: the floor, ratios and whether targets are met."""
    if "bytes" not in row:
        return row
    row["floor"] = row["bytes"] / bandwidth * 1e6
    median = _median(row, "kernel")
    if median is None:
        return row
    row["times_floor"] = median / row["floor"]
    if row["flops"]:
        row["tflops"] = row["flops"] / median / 1e6
    row["targets"] = [
        {"kind": target.kind, "limit": target.limit, "value": value, "is_met": is_met and "wrong" not in row}
        for target in case.targets
        for value, is_met in [_compared(target, row, median)]
    ]
    return row


def _compared(target: Target, row: Row, median: float) -> tuple[float | None, bool]:
    if target.kind == "floor":
        return row["times_floor"], row["times_floor"] <= target.limit
    if target.kind == "bandwidth":
        return 1 / row["times_floor"], 1 / row["times_floor"] >= target.limit
    usual = _median(row, "usual")
    return (None, False) if usual is None else (usual / median, usual / median >= target.limit)


def show(console: Console, rows: Sequence[Row], machine: Row) -> None:
    launch = machine.get("launch", {})
    console.print(
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, commit"
        f" {machine['commit']}. Copies {machine['copy_bandwidth'] / 1e12:.2f} TB/s, read and written. An empty launch"
        f" takes {launch.get('median', float('nan')):.1f} µs, and {launch.get('host', float('nan')):.1f} µs of the"
        " host, which no floor contains."
    )
    table = Table(title="µs: medians, quartiles in brackets; of the others also how many times the kernel's")
    table.add_column("case", max_width=44)
    for name in ("MB", "floor", "kernel", "x floor", "host", *OTHERS):
        table.add_column(name, justify="right", no_wrap=name not in OTHERS)
    table.add_column("", max_width=34)
    for row in rows:
        table.add_row(row["name"], *_cells(row), _notes(row))
    console.print(table)
    is_met = [target["is_met"] for row in rows for target in row.get("targets", [])]
    console.print(f"{sum(is_met)} of {len(is_met)} targets are met.")


def _cells(row: Row) -> list[str]:
    own = row.get("columns", {}).get("kernel", {})
    cells = ["", "", "", "", ""]
    if "bytes" in row:
        cells[:2] = [f"{row['bytes'] / 1e6:.2f}", f"{row['floor']:.1f}"]
    if "median" in own:
        cells[2] = f"{own['median']:.1f} ({own['first_quartile']:.1f}–{own['third_quartile']:.1f})"
        cells[3:] = [f"{row['times_floor']:.2f}", f"{own['host']:.0f}"]
    elif "error" in own:
        cells[2] = "failed"
    return cells + [_other(row, name) for name in OTHERS]


def _other(row: Row, name: str) -> str:
    column = row.get("columns", {}).get(name)
    if column is None:
        return "-"
    if "median" not in column:
        return "no time" if column["error"] == NO_TIME else "failed"
    own = _median(row, "kernel")
    ratio = "" if own is None else f" {column['median'] / own:.1f}x"
    return f"{column['median']:.1f}{ratio}"


NO_TIME = "no time was left"


def _notes(row: Row) -> str:
    notes: list[str] = []
    if "wrong" in row:
        notes.append(f"WRONG: {row['wrong']}")
    if "error" in row:
        notes.append(f"ERROR: {row['error']}")
    if "tflops" in row:
        notes.append(f"{row['tflops']:.0f} TFLOP/s")
    notes += [_verdict(target) for target in row.get("targets", [])]
    columns = row.get("columns", {})
    failed = ("kernel", "reference", "usual", "compiled", *LIBRARIES)
    notes += [f"{name}: {columns[name]['error']}" for name in failed if "error" in columns.get(name, {})]
    return "; ".join(notes)


def _verdict(target: dict[str, Any]) -> str:
    said = {
        "floor": "at most {:.1f}x the floor",
        "bandwidth": "at least {:.0%} of a copy's bandwidth",
        "usual": "at least {:.0f}x as fast as sorting",
    }[target["kind"]].format(target["limit"])
    return f"{'PASS' if target['is_met'] else 'MISS'} {said}"


def _median(row: Row, name: str) -> float | None:
    value: float | None = row.get("columns", {}).get(name, {}).get("median")
    return value
