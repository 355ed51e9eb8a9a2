"""The compiler beside the engine: real worker processes, which are stopped, killed and replaced."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from cadenza.decoding.constraints import compile as compile_module
from cadenza.decoding.constraints import compiler as compiler_module
from cadenza.decoding.constraints import worker, worker_process
from cadenza.decoding.constraints.compile import compile_spec
from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.worker_process import WorkerProcess
from cadenza.decoding.request import EngineClosed, QueueFull, RequestError
from cadenza.server.errors import describe
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.routes.generate import _compiled, _submit

from .compiling import VOCABULARY, WAIT, Make, error_of, is_gone, only_worker, spec


@pytest.fixture
def compiler(make: Make, monkeypatch: pytest.MonkeyPatch) -> ConstraintCompiler:
    """With one worker, so that it is known who is asked."""
    monkeypatch.setattr(compiler_module, "_NUM_WORKERS", 1)
    return make()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ConstraintSpec]:
    """What workers are asked."""
    questions: list[ConstraintSpec] = []
    ask = WorkerProcess.ask

    def counting(self: WorkerProcess, question: ConstraintSpec) -> Any:
        questions.append(question)
        return ask(self, question)

    monkeypatch.setattr(WorkerProcess, "ask", counting)
    return questions


def stopped_in_the_middle(compiler: ConstraintCompiler, number: int) -> "tuple[int, Future[Constraint]]":
    pid = only_worker(compiler).pid
    os.kill(pid, signal.SIGSTOP)
    return pid, compiler.compile(spec(number))


# once for all who ask


def test_concurrent_equal_requests_compile_once(make: Make, asked: list[ConstraintSpec]) -> None:
    compiler, start = make(), threading.Barrier(24)

    def ask(number: int) -> Constraint:
        start.wait()
        return compiler.compile(ConstraintSpec.regex("[a-f]{30}", param=f"field {number % 5}")).result(WAIT)

    with ThreadPoolExecutor(24) as pool:
        results = list(pool.map(ask, range(24)))
    assert all(result is results[0] for result in results)
    assert len(asked) == 1
    assert compiler.compile(ConstraintSpec.regex("[a-f]{30}")).result(0) is results[0]
    compiler.compile(ConstraintSpec.regex("[a-f]{31}")).result(WAIT)
    assert len(asked) == 2


def test_the_least_recently_used_goes_first(
    compiler: ConstraintCompiler, asked: list[ConstraintSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_CACHE_ENTRIES", 3)
    for number in (0, 1, 2, 0, 3):
        compiler.compile(spec(number)).result(WAIT)
    assert asked == [spec(0), spec(1), spec(2), spec(3)]
    asked.clear()
    for number in (0, 2, 3):
        compiler.compile(spec(number)).result(0)
    assert asked == []
    compiler.compile(spec(1)).result(WAIT)
    assert asked == [spec(1)]


def test_what_is_kept_is_bounded_in_bytes_sources_and_refusals_included(
    compiler: ConstraintCompiler, asked: list[ConstraintSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_CACHE_BYTES", 100_000)
    first = compiler.compile(spec(0)).result(WAIT)
    assert 0 < first.num_bytes < 10_000
    padding = " " * 70_000
    refused = [
        ConstraintSpec.grammar(padding),
        ConstraintSpec.json_schema({"type": "object"}, whitespace_pattern="(" + padding),
    ]
    for each in refused:
        assert isinstance(error_of(compiler.compile(each)), ConstraintError)
        assert compiler._cache._num_bytes <= 100_000
    asked.clear()
    compiler.compile(spec(0)).result(WAIT)
    assert asked == [spec(0)], "two large refusals have pushed it out"


def test_refusals_are_kept_without_the_stacks_of_those_who_asked(
    compiler: ConstraintCompiler, asked: list[ConstraintSpec]
) -> None:
    bad = ConstraintSpec.regex("(")
    depths, messages = [], set()
    for _ in range(30):
        with pytest.raises(ConstraintError) as raised:
            compiler.compile(bad).result(WAIT)
        depths.append(len(traceback.extract_tb(raised.value.__traceback__)))
        messages.add(str(raised.value))
    assert asked == [bad]
    assert len(messages) == 1
    assert len(set(depths[1:])) == 1


def test_no_one_can_cancel_what_others_wait_for(compiler: ConstraintCompiler) -> None:
    pid, future = stopped_in_the_middle(compiler, 5)
    assert not future.cancel()
    queued = compiler.compile(spec(6))
    assert not queued.cancel()
    os.kill(pid, signal.SIGCONT)
    assert future.result(WAIT).spec == spec(5)
    assert queued.result(WAIT).spec == spec(6)


def test_more_than_can_wait_is_refused_and_forgotten(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_MAX_UNDER_WAY", 3)
    pid, future = stopped_in_the_middle(compiler, 0)
    others = [compiler.compile(spec(number)) for number in (1, 2)]
    with pytest.raises(QueueFull):
        compiler.compile(spec(3)).result(0)
    assert compiler.compile(spec(2)) is others[1], "who waits with others takes no place"
    os.kill(pid, signal.SIGCONT)
    for waited in (future, *others, compiler.compile(spec(4))):
        waited.exception(WAIT)
    compiler.compile(spec(3)).result(WAIT)


# workers that die


def test_a_worker_killed_in_the_middle_fails_that_compilation_only(compiler: ConstraintCompiler) -> None:
    pid, future = stopped_in_the_middle(compiler, 1)
    os.kill(pid, signal.SIGKILL)
    error = error_of(future)
    assert isinstance(error, ConstraintTooComplex)
    assert "MiB" in str(error)
    assert is_gone(pid)
    assert compiler.compile(spec(1)).result(WAIT).spec == spec(1), "it was not the constraint's fault"
    assert [process.pid for process in compiler._workers if process.is_alive] != [pid]


def test_a_worker_that_is_late_is_ended(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = only_worker(compiler).pid
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(worker_process, "_LATE_SECONDS", 0.3)
    started = time.monotonic()
    error = error_of(compiler.compile(spec(2)))
    assert 0.3 <= time.monotonic() - started < 10
    assert isinstance(error, ConstraintTooComplex)
    assert "0.3 seconds" in str(error)
    assert is_gone(pid)
    monkeypatch.setattr(worker_process, "_LATE_SECONDS", WAIT)
    assert compiler.compile(spec(2)).result(WAIT).spec == spec(2)


def test_a_worker_that_died_while_idle_is_replaced_unnoticed(compiler: ConstraintCompiler) -> None:
    process = only_worker(compiler)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert compiler.compile(spec(3)).result(WAIT).spec == spec(3)
    assert is_gone(process.pid)


@pytest.mark.parametrize("program", ["false", "cat"])
def test_a_worker_that_cannot_start_is_an_error_of_ours_and_leaves_no_process(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"there is no {program}")
    made: list[int] = []
    popen = worker_process.subprocess.Popen

    def noting(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        made.append(process.pid)
        return process

    monkeypatch.setattr(worker_process.subprocess, "Popen", noting)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", path)
        error = error_of(compiler.compile(spec(4)))
    assert isinstance(error, RuntimeError)
    assert not isinstance(error, ConstraintError)
    assert len(made) == 1
    assert is_gone(made[0])
    assert compiler.compile(spec(4)).result(WAIT).spec == spec(4)


def test_an_interrupt_from_the_keyboard_does_not_reach_the_workers(compiler: ConstraintCompiler) -> None:
    assert os.getpgid(only_worker(compiler).pid) != os.getpgrp()


# the end


def test_closing_ends_the_workers_and_fails_what_is_under_way(make: Make) -> None:
    compiler = make()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: compiler.compile(spec(number)).result(WAIT), range(8)))
    pids = [process.pid for process in compiler._workers]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    waiting = [compiler.compile(spec(number)) for number in range(20, 26)]
    compiler.close()
    assert all(isinstance(error_of(future), EngineClosed) for future in waiting)
    assert all(map(is_gone, pids))
    with pytest.raises(EngineClosed):
        compiler.compile(spec(30)).result(0)
    assert compiler.compile(spec(0)).result(0).spec == spec(0), "what is known may still be asked"
    compiler.close()


def test_closing_while_a_worker_starts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []
    begin = WorkerProcess.__init__

    def noting(self: WorkerProcess, *arguments: Any) -> None:
        started.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(WorkerProcess, "__init__", noting)
    compiler = make()
    future = compiler.compile(spec(0))
    while not started:
        time.sleep(0.001)
    compiler.close()
    assert isinstance(error_of(future), EngineClosed)
    assert is_gone(started[0].pid)


# what goes wrong inside


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (RecursionError(), ConstraintTooComplex, "nested too deeply"),
        (MemoryError(), ConstraintTooComplex, "150 MiB"),
        (ConstraintError("no", "here"), ConstraintError, "no (at here)"),
        (KeyError("a defect"), RuntimeError, "KeyError: 'a defect'"),
    ],
)
def test_what_a_compilation_may_raise(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], words: str
) -> None:
    def fail(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(compile_module, "parse_regex", fail)
    answer = worker._answer(spec(0), VOCABULARY, Effort())
    assert type(answer) is expected
    assert words in str(answer)


def test_a_defect_is_not_kept_and_is_an_internal_error_of_one_request(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = WorkerProcess.ask

    def failing(self: WorkerProcess, question: ConstraintSpec) -> Any:
        if question == spec(1):
            raise RuntimeError("compiling the constraint failed: KeyError: 3")
        return ask(self, question)

    monkeypatch.setattr(WorkerProcess, "ask", failing)
    bad, good = compiler.compile(spec(1)), compiler.compile(spec(2))
    with pytest.raises(RuntimeError) as defect:
        bad.result(WAIT)
    assert describe(defect.value).status == 500  # type: ignore[arg-type]
    assert good.result(WAIT).spec == spec(2)
    monkeypatch.setattr(WorkerProcess, "ask", ask)
    assert compiler.compile(spec(1)).result(WAIT).spec == spec(1)


def test_a_client_that_hangs_up_takes_nothing_from_the_others(compiler: ConstraintCompiler) -> None:
    pid = only_worker(compiler).pid
    engine: Any = SimpleNamespace(constraints=compiler)

    async def two_clients() -> tuple[Any, Any]:
        os.kill(pid, signal.SIGSTOP)
        first = asyncio.create_task(_compiled(engine, spec(40)))
        second = asyncio.create_task(_compiled(engine, spec(40)))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(asyncio.CancelledError):
            await first
        return first.cancelled(), await asyncio.wait_for(second, WAIT)

    was_cancelled, constraint = asyncio.run(two_clients())
    assert was_cancelled
    assert constraint.spec == spec(40)


def test_a_refusal_names_the_field_that_asked(compiler: ConstraintCompiler) -> None:
    engine: Any = SimpleNamespace(constraints=compiler)
    for param in ("guided_regex", "response_format", "guided_regex"):
        with pytest.raises(RequestError) as refused:
            asyncio.run(_compiled(engine, ConstraintSpec.regex("(a", param=param)))
        assert refused.value.param == param
        assert str(refused.value).startswith(f"{param}: ")
        assert describe(refused.value).status == 400
    assert asyncio.run(_compiled(engine, None)) is None


@pytest.mark.parametrize(("field", "value"), [("stop", ["x"]), ("min_tokens", 2), ("bad_words", ["a"])])
def test_what_no_constraint_allows_is_refused_before_it_is_compiled(field: str, value: Any) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "guided_regex": "a" * 9, field: value}
    engine = SimpleNamespace(model=SimpleNamespace(sampling_defaults={}, eos_token_ids=(2,)))
    target: Any = SimpleNamespace(engine=engine)
    with pytest.raises(RequestError, match="cannot be combined with a constraint") as refused:
        asyncio.run(
            _submit(
                None,  # type: ignore[arg-type]
                target,  # whose engine has nothing to compile with
                ChatRequest.model_validate(fields),
                [(1,)],
                logprobs=None,
                prompt_logprobs=None,
            )
        )
    assert refused.value.param == field


def test_the_worker_answers_as_compiling_here_would(compiler: ConstraintCompiler) -> None:
    """The same automaton and the same grammar, whatever crosses the pipe."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for asked in (
        spec(3),
        ConstraintSpec.json_schema(schema),
        ConstraintSpec.grammar('start: "a" start "b" | "c"'),
    ):
        constraint = compiler.compile(asked).result(WAIT)
        here: Any = compile_spec(asked, VOCABULARY, Effort())
        assert constraint.min_tokens == here.min_tokens
        assert type(constraint.compiled) is type(here)
        if asked.kind != "regex":
            assert constraint.compiled.text == here.text  # type: ignore[union-attr]
    assert json.loads(ConstraintSpec.json_schema(schema).source) == schema
