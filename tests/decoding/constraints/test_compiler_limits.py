"""What one constraint may cost where constraints are compiled: processor time, memory, and nobody else's time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cadenza.decoding.constraints import compiler as compiler_module
from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.worker_process import WorkerProcess

from .compiling import VOCABULARY, WAIT, Make, error_of, is_gone, only_worker, spec

MEMORY = 200 * 1024  # kilobytes

linux_only = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


def number_in(process: WorkerProcess, name: str) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def seconds_of(process: WorkerProcess) -> float:
    """Of processor time."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def many_texts(count: int) -> ConstraintSpec:
    return ConstraintSpec.choice([f"{number * 7919 % 100_003} is number {number}" for number in range(count)])


@pytest.fixture(scope="module")
def crowded() -> Iterator[ConstraintCompiler]:
    """One worker for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler_module, "_NUM_WORKERS", 1)
        compiler = ConstraintCompiler(lambda: (VOCABULARY, VOCABULARY), VOCABULARY.segment)
    yield compiler
    compiler.close()


def nested(levels: int, begin: str, middle: str, end: str) -> str:
    return begin * levels + middle + end * levels


WIDE = {"type": "object", "properties": {f"name {n}": {"pattern": f"^x{n}.*y$"} for n in range(4000)}}
HOSTILE = {
    "counted repetitions of counted repetitions": ConstraintSpec.regex("(?:[ab]{1,1000}){1,1000}"),
    "a million characters": ConstraintSpec.regex(r"\w{1,1000000}"),
    "exponential determinization": ConstraintSpec.regex("(0|1)*1(0|1){24}"),
    "catastrophic for backtracking": ConstraintSpec.regex("(a|a|aa)*(a|aa)*(a|aa)*" * 60),
    "brackets in brackets": ConstraintSpec.regex(nested(100_000, "(", "a", ")")),
    "half a surrogate pair": ConstraintSpec.regex("\ud83d+"),
    "no text at all": ConstraintSpec.regex(r"[^\s\S]x"),
    "many alternatives": ConstraintSpec.choice(
        [f"{n * 7919 % 100_003} is number {n}" for n in range(25_000)]
    ),
    "a source of a megabyte": ConstraintSpec.json_schema({"enum": ["x" * 1_000_000]}),
    "a spacing of a megabyte": ConstraintSpec.json_object(whitespace_pattern=" *" * 500_000),
    "schemas in schemas": ConstraintSpec("json_schema", nested(30_000, '{"items":', "{}", "}")),
    "references to each other": ConstraintSpec.json_schema(
        {"$ref": "#/$defs/0", "$defs": {f"{n}": {"allOf": [{"$ref": f"#/$defs/{n ^ 1}"}]} for n in range(2)}}
    ),
    "thousands of properties": ConstraintSpec.json_schema(WIDE),
    "long strings, often": ConstraintSpec.json_schema(
        {"type": "array", "maxItems": 10**6, "items": {"type": "string", "maxLength": 10**6}}
    ),
    "powers of alternatives": ConstraintSpec.json_schema(
        {"allOf": [{"anyOf": [{"required": [f"{n}{side}"]} for side in "abc"]} for n in range(30)]}
    ),
    "rules that double": ConstraintSpec.grammar(
        "start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(64)) + 'r64: "a"\n'
    ),
    "repeated repetitions": ConstraintSpec.grammar('start: (("a" | "b"~1..5000)~1..5000)~1..5000'),
    "a grammar of brackets": ConstraintSpec.grammar("start: " + nested(50_000, "(", '"a"', ")")),
    "bytes that are no text": ConstraintSpec.grammar('start: "\udcff\udcfe"'),
}


@linux_only
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_stay_within_memory_and_processor_time(
    crowded: ConstraintCompiler, name: str
) -> None:
    """Each ends in an answer or a refusal of one line, and an ordinary one can be compiled after it."""
    process = only_worker(crowded)
    used, before = seconds_of(process), number_in(process, "VmHWM")
    error = error_of(crowded.compile(HOSTILE[name]))
    assert error is None or isinstance(error, ConstraintError), error
    assert "\n" not in str(error)
    assert len(str(error)) < 500
    if process.is_alive:
        assert seconds_of(process) - used < 2.0
        assert number_in(process, "VmHWM") - before < MEMORY
    else:  # its allocations failed, or it would have kept too much
        assert error is None or "MiB" in str(error)
    crowded._cache = compiler_module._Cache()
    only_worker(crowded)


@linux_only
def test_a_worker_short_of_memory_refuses_and_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "_NUM_WORKERS", 1)
    compiler = make(Limits(max_memory_bytes=8 * 2**20))
    for size in (4000, 4001, 4002):
        error = error_of(compiler.compile(many_texts(size)))
        assert isinstance(error, ConstraintTooComplex)
        assert "8 MiB" in str(error)
    assert compiler.compile(spec(8)).result(WAIT).spec == spec(8)


@linux_only
def test_a_worker_that_kept_too_much_memory_is_replaced_after_its_answer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_NUM_WORKERS", 1)
    compiler = make(Limits(max_memory_bytes=0))
    pids = []
    for number in range(3):
        compiler.compile(spec(number)).exception(WAIT)
        pids.append(compiler._workers[-1].pid)
    assert len(set(pids)) == 3
    assert all(map(is_gone, pids))


def test_an_ordinary_compilation_waits_for_no_hostile_one(make: Make) -> None:
    compiler = make()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: compiler.compile(spec(number)).result(WAIT), range(2)))
    slow = compiler.compile(HOSTILE["thousands of properties"])
    for number in range(10, 20):
        compiler.compile(spec(number)).result(WAIT)
    slow.exception(WAIT)
