"""benchmarks/kernels.py without a GPU: its cases at tiny sizes in Triton's interpreter, its table, its processes."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The modules of the benchmark's folder, and the script itself, which is no module of that name elsewhere."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("case", "measure", "report", "sweeps", "timing", "worker")
        found = {name: importlib.import_module(f"kernel_cases.{name}") for name in names}
        spec = importlib.util.spec_from_file_location("kernel_benchmark", FOLDER / "kernels.py")
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        yield {**found, "script": script}


MACHINE = {
    "gpu": "none",
    "driver": "0",
    "torch": "0",
    "triton": "0",
    "python": "0",
    "commit": "0",
    "copy_bandwidth": 4e12,
    "launch": {"median": 2.0, "host": 9.0},
}


class KernelsRanAlready:
    """A timer that runs everything but the first function, the kernel: that has just been compared."""

    def __init__(self, parts: dict[str, ModuleType]) -> None:
        self._timer = parts["timing"].CpuTimer()
        self._is_first = True

    def __call__(self, function: Any) -> Any:
        function, self._is_first = (lambda: None) if self._is_first else function, False
        return self._timer(function)


def test_every_case_is_right_and_moves_bytes(
    parts: dict[str, ModuleType], kernel_device: torch.device
) -> None:
    rows = []
    for case in parts["measure"].all_cases(parts["case"].TINY):
        row = parts["measure"].measure(case, kernel_device, KernelsRanAlready(parts))
        assert "error" not in row, (case.name, row)
        assert "wrong" not in row, (case.name, row)
        assert row["bytes"] > 0, case.name
        assert all("error" not in column for column in row["columns"].values()), (case.name, row)
        rows.append(parts["report"].finish({"name": case.name, **row}, case, 4e12))
    console = Console(width=parts["report"].WIDTH, record=True, quiet=True)
    parts["report"].show(console, rows, MACHINE)
    json.dumps(rows)


def test_a_wrong_result_is_found(parts: dict[str, ModuleType]) -> None:
    case = parts["case"]
    true = torch.randn(64, generator=torch.Generator().manual_seed(0))
    wrong = true.clone()
    wrong[7] += 1e-3

    def compared(actual: torch.Tensor, expected: torch.Tensor, **settings: Any) -> float:
        work = case.Work(lambda: None, lambda: None, lambda: [(actual, expected)], 1, **settings)
        return float(case.compare(work))

    assert compared(true, true.double()) < 1e-7
    with pytest.raises(case.Wrong, match="is off by"):
        compared(wrong, true)
    with pytest.raises(case.Wrong, match="is off by nan"):
        compared(torch.full((3,), torch.nan), torch.ones(3))
    with pytest.raises(case.Wrong, match="infinities"):
        compared(torch.zeros(2), torch.tensor([0.0, -torch.inf]))
    assert compared(torch.tensor([1, 2]), torch.tensor([1, 3]), num_ties=1) == 0
    with pytest.raises(case.Wrong, match="1 of 2 integers"):
        compared(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_sizes_that_are_served_make_all_cases(parts: dict[str, ModuleType]) -> None:
    cases = parts["measure"].all_cases(parts["case"].Sizes())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert "fused_sampling: top-k, top-p, 256 rows" in names
    measured = {case.kernel for case in cases}
    kernels = Path(__file__).parents[1] / "kernels"
    with_floors = {path.stem for path in kernels.glob("*.py") if "_bytes(" in path.read_text()}
    assert with_floors - {"few_rows"} == measured  # that is a part of the products with weights
    for only in ("fused_sampling", "decode_attention: 32"):
        assert parts["measure"].chosen(cases, [only], is_quick=False)
    assert set(parts["sweeps"].SWEEPS) == measured


def _column(median: float) -> dict[str, float]:
    return {
        "first_quartile": median - 1,
        "median": median,
        "third_quartile": median + 1,
        "host": 5.0,
        "repetitions": 3,
    }


def test_targets_are_marked(parts: dict[str, ModuleType]) -> None:
    case_of, report = parts["case"], parts["report"]
    targets = tuple(
        case_of.Target(kind, limit) for kind, limit in (("floor", 1.5), ("bandwidth", 0.75), ("usual", 10.0))
    )
    case = case_of.Case("k", "w", lambda device: None, targets=targets)

    def met(median: float, usual: float, **more: Any) -> list[bool]:
        columns = {"kernel": _column(median), "usual": _column(usual)}
        row = report.finish({"bytes": 40_000_000, "flops": 0, "columns": columns, **more}, case, 4e12)
        assert row["floor"] == pytest.approx(10.0)
        return [target["is_met"] for target in row["targets"]]

    assert met(12.0, 130.0) == [True, True, True]
    assert met(14.0, 130.0) == [True, False, False]
    assert met(16.0, 10.0) == [False, False, False]
    assert met(12.0, 130.0, wrong="by far") == [False, False, False]


def test_failures_stay_in_their_columns(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, case_of = parts["measure"], parts["case"]

    def fails() -> None:
        raise RuntimeError("out of resources\nat length")

    work = case_of.Work(lambda: None, fails, lambda: [], 8, libraries={"vllm": fails})
    case = case_of.Case("k", "w", lambda device: work)
    timer, device = parts["timing"].CpuTimer(), torch.device("cpu")
    row = measure.measure(case, device, timer)
    assert row["columns"]["reference"] == {"error": "RuntimeError: out of resources"}
    assert row["columns"]["kernel"]["median"] >= 0
    assert measure.measure(case_of.Case("k", "w", lambda device: fails()), device, timer) == {
        "error": "RuntimeError: out of resources"
    }
    assert measure.measure_libraries(case, device, timer) == {"columns": {}}
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: name == "vllm" or None)
    assert "out of resources" in measure.measure_libraries(case, device, timer)["columns"]["vllm"]["error"]
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    assert "out of resources" in measure.measure_compiled(case, device, timer)["columns"]["compiled"]["error"]
    monkeypatch.setattr(measure, "COMPILE_SECONDS", 1)

    def spins() -> None:
        while True:
            pass

    work.reference = spins
    answer = measure.measure_compiled(case, device, timer)["columns"]["compiled"]
    assert answer == {"error": "TimeoutError: more than 1 s"}


def test_time_is_quartiles_of_repetitions(parts: dict[str, ModuleType]) -> None:
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 6.0])
    timer = parts["timing"].CpuTimer(3, lambda: next(ticks))
    assert timer(lambda: None) == (1.5e6, 2e6, 2.5e6, 2e6, 3)


class FakeEvent:
    """Of a GPU on which everything takes two milliseconds."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 2.0


def test_repetitions_on_a_gpu_are_bounded(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(parts["timing"], "FLUSHED_BYTES", 16)
    calls = []
    quick = parts["timing"].CudaTimer(torch.device("cpu"), budget=10.0, most=30)
    spread = quick(lambda: calls.append(1))
    assert spread[:3] == pytest.approx((2000.0, 2000.0, 2000.0))
    assert (spread.repetitions, len(slept), len(calls)) == (30, 30, 34)  # with one to compile, three to try
    assert min(slept) > 0
    assert parts["timing"].CudaTimer(torch.device("cpu"), budget=0.0, most=30)(lambda: None).repetitions == 5


def test_tasks_are_answered(parts: dict[str, ModuleType], kernel_device: torch.device) -> None:
    """As the process does that measures, one after the other."""
    cases = {case.name: case for case in parts["measure"].all_cases(parts["case"].TINY)}
    timer = parts["timing"].CpuTimer(2)

    def answer(verb: str, case: str = "gated_activation: 3 rows", **more: Any) -> Any:
        task = {"verb": verb, "case": case, **more}
        return parts["worker"].answer_to(task, cases, kernel_device, timer)

    sweep = parts["sweeps"].SWEEPS["gated_activation"][0]
    tried = answer("settings", settings=[sweep.setting(sweep.current // 2)])
    assert tried["columns"]["kernel"]["median"] > 0
    assert "error" in answer("settings", settings=[sweep.setting("wrong")])
    assert answer("measure")["columns"].keys() == {"kernel", "reference", "usual"}
    assert "KeyError" in answer("measure", "no such case")["error"]
    assert parts["timing"].launch_overhead(timer).median > 0


WORKER = """
import json, os, sys, time
print(json.dumps({}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task == "hang":
        time.sleep(60)
    if task == "end":
        print("no memory", file=sys.stderr, flush=True)
        os._exit(9)
    print(json.dumps({"said": task, "pid": os.getpid(), "is_over": task == "last"}), flush=True)
"""


def test_a_process_that_hangs_or_ends_is_replaced(parts: dict[str, ModuleType]) -> None:
    workers = parts["worker"].Workers([sys.executable, "-c", WORKER])
    try:
        first = workers.ask("a", 10.0)
        assert first["said"] == "a"
        assert workers.ask("b", 10.0)["pid"] == first["pid"]
        assert workers.ask("hang", 0.2) == {"error": "no answer in 0 s"}
        second = workers.ask("c", 10.0)
        assert second["pid"] != first["pid"]
        assert workers.ask("end", 10.0) == {"error": "the process ended. no memory"}
        third = workers.ask("last", 10.0)
        assert third["said"] == "last"
        assert workers.ask("d", 10.0)["pid"] != third["pid"]
    finally:
        workers.close()


class Answers:
    """In place of the processes."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.verbs: list[str] = []

    def ask(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.clock[0] += 10.0
        self.verbs.append(task["verb"])
        if task["verb"] == "machine":
            return dict(MACHINE)
        if task["verb"] == "compiled":
            return {"error": "no answer in 40 s"}
        if task["verb"] == "libraries":
            return {"columns": {}}
        if task["case"] == "kv_write: 1 row":
            return {"error": "an illegal memory access"}
        columns = {"kernel": _column(20.0), "reference": _column(300.0)}
        return {"bytes": 4_000_000, "flops": 0, "difference": 0.0, "columns": columns}


def test_a_run_writes_its_rows(
    parts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, clock, path = parts["script"], [0.0], tmp_path / "rows.json"
    options = script.parse(["--only", "kv_write", "--json", str(path), "--minutes", "1.7"])
    answers = Answers(clock)
    assert script.measure(options, answers, lambda: clock[0]) == 1
    said = json.loads(path.read_text())
    assert said["copy_bandwidth"] == 4e12
    rows = {row["name"]: row for row in said["rows"]}
    assert rows["kv_write: 1 row"]["error"] == "an illegal memory access"
    assert rows["kv_write: 32 rows"]["times_floor"] == 20.0
    assert rows["kv_write: 4096 rows"]["columns"]["compiled"] == {"error": parts["report"].NO_TIME}
    out = capsys.readouterr().out
    assert "ERROR: an illegal" in out
    assert "15.0x" in out
    assert "no time" in out
    clock[0] = 0.0
    quick = script.parse(["--only", "kv_write", "--quick"])
    answers.verbs.clear()
    assert script.measure(quick, answers, lambda: clock[0]) == 0
    assert answers.verbs == ["machine", "measure"]
    assert script.measure(script.parse(["--only", "none"]), answers) == 2


def test_without_a_gpu_it_says_so(parts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert parts["script"].main(["--quick"]) == 2
    assert "no GPU" in capsys.readouterr().err


class Launches:
    """In place of every kernel: what is launched, with which numbers and options. Nothing runs."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, kernel: Any, grid: Any) -> Any:
        def launched(*arguments: Any, **options: Any) -> None:
            numbers = [each for each in arguments if isinstance(each, (int, float, str))]
            self.seen.append((kernel.__name__, grid, numbers, sorted(options.items())))

        return launched


def test_sweeps_change_launches_and_put_constants_back(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the widths that are served, since tables go by these."""
    from triton.runtime.jit import JITFunction

    launches = Launches()
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: launches(kernel, grid))
    served, tiny = parts["case"].Sizes(), parts["case"].TINY
    sizes = dataclasses.replace(
        tiny,
        hidden=served.hidden,
        inner=1024,
        head=served.head,
        heads=served.heads,
        kv_heads=served.kv_heads,
        product_rows=served.product_rows,
    )
    cases = parts["measure"].all_cases(sizes)

    def launched(work: Any, setting: Any = ()) -> list[Any]:
        launches.seen.clear()
        with parts["worker"].settings_in_place([json.loads(json.dumps(each)) for each in setting]):
            work.kernel()
        return list(launches.seen)

    for kernel, sweeps in parts["sweeps"].SWEEPS.items():
        for sweep in sweeps:
            own = [case for case in cases if case.kernel == kernel and case.what.startswith(sweep.cases)]
            assert own, sweep
            work = own[-1].make(torch.device("cpu"))
            before = sweep.current
            as_it_is = launched(work)
            values = [value for value in sweep.candidates(before) if value != before]
            assert values, sweep
            for value in values:
                assert launched(work, [sweep.setting(value)]) != as_it_is, (sweep, value)
            assert sweep.current == before
            assert launched(work) == as_it_is


def test_a_sweep_prints_the_best(parts: dict[str, ModuleType]) -> None:
    sweeps = parts["sweeps"]

    def ask(name: str, settings: list[tuple[str, str, str, str]]) -> dict[str, Any]:
        if "'num_warps': 8" in settings[-1][3]:
            return {"error": "out of resources"}
        return {"columns": {"kernel": _column(3.0 if "'num_warps': 2" in settings[-1][3] else 12.0)}}

    own = [sweep for sweep in sweeps.SWEEPS["logit_edits"] if sweep.constant.endswith("OPTIONS")]
    said: list[str] = []
    lines = sweeps.run(own, ["logit_edits: 1 row"], ask, said.append, lambda: True)
    assert len(lines) == len(own)
    assert all("'num_warps': 2" in line and line.endswith("# 3.00 µs, now 12.00") for line in lines)
    assert any("out of resources" in text for text in said)
    assert math.isinf(float(next(text for text in said if "'num_warps': 8" in text).split()[0]))
    assert (
        "no time" in sweeps.run(own, ["logit_edits: 1 row"], ask, said.append, lambda: False)[0] or said[-1]
    )


def test_its_name_is_not_taken_for_a_package() -> None:
    """Scripts of the folder have it first on their path, and transformers looks for Hugging Face's `kernels`."""
    code = "from transformers.utils.import_utils import is_kernels_available as found; print(found())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {code}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, cwd=FOLDER.parent / "docs"
    )
    assert done.stdout.split()[-1] == "False"
