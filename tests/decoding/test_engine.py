"""The engine's life: queueing, aborting, closing, failing, and what its streams tell from threads and event loops.

Steps are held at a gate where a test must act in the middle of one; nothing here waits for time to pass.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from cadenza.decoding import (
    Delta,
    Engine,
    EngineClosed,
    EngineConfig,
    GenerationRequest,
    PromptDone,
    QueueFull,
    RequestError,
    RequestFailed,
    RequestStream,
    SamplingParams,
)
from cadenza.decoding.completion import Completion, collect
from cadenza.models import LoadedModel

PROMPT = tuple(range(100, 140))
LONG = {"max_tokens": 150, "ignore_eos": True}
SHORT = {"max_tokens": 4, "ignore_eos": True}
DEADLINE = 120.0  # a test that hangs ends here; none comes near


class Gate:
    """Takes the place of an engine's runner: says when a step has come, holds it until opened, lets it fail."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine._core._runner
        engine._core._runner = self  # type: ignore[assignment]
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.next_error: Exception | None = None

    def __call__(self, step: Any, *wants: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(DEADLINE)
        error, self.next_error = self.next_error, None
        if error is not None:
            raise error
        return self._runner(step, *wants)


@pytest.fixture
def start(tiny_model: LoadedModel) -> Iterator[Callable[..., Engine]]:
    """Starts small engines and ends them with the test."""
    engines: list[Engine] = []

    def build(**fields: Any) -> Engine:
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_gb": 0.001} | fields
        engines.append(Engine(tiny_model, EngineConfig(**settings)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def tiny_engine(start: Callable[..., Engine]) -> Engine:
    return start()


def submit(engine: Engine, prompt: Sequence[int] = PROMPT, **fields: Any) -> RequestStream:
    sampling = SamplingParams(**{"temperature": 0.0, **fields})
    return engine.submit(
        GenerationRequest(request_id="test", prompt_token_ids=tuple(prompt), sampling=sampling)
    )


def begin(engine: Engine, **fields: Any) -> RequestStream:
    """A request that is known to be running: its first token is there."""
    stream = submit(engine, **fields)
    for event in stream:
        if isinstance(event, Delta):
            return stream
    raise AssertionError("no token came")


def settle(engine: Engine) -> None:
    """Returns once the engine has dealt with everything that was sent to it before."""
    collect(submit(engine, **SHORT), 1)


# abort


@pytest.mark.parametrize("n", [1, 3])
def test_abort_frees_all_blocks(tiny_engine: Engine, n: int):
    stream = begin(tiny_engine, n=n, **LONG)
    assert tiny_engine.stats().kv_cache_usage > 0
    stream.abort()
    stream.abort()
    settle(tiny_engine)
    assert tiny_engine.stats().kv_cache_usage == 0
    assert tiny_engine.stats().num_running == 0
    assert stream.is_closed
    assert all(isinstance(event, Delta) for event in stream)  # what had come before; then it just ends


def test_abort_harms_no_other(tiny_engine: Engine):
    alone = collect(submit(tiny_engine, prompt=range(7, 90), **LONG), 1)
    unwanted = [begin(tiny_engine, **LONG) for _ in range(3)]
    kept = submit(tiny_engine, prompt=range(7, 90), **LONG)
    for stream in unwanted:
        stream.abort()
    assert collect(kept, 1).choices == alone.choices


def test_abort_of_a_request_that_still_waits(start: Callable[..., Engine]):
    engine = start(max_num_seqs=1)
    gate = Gate(engine)
    running = submit(engine, **SHORT)
    assert gate.reached.wait(DEADLINE)
    waiting = submit(engine, **SHORT)
    waiting.abort()
    gate.opened.set()
    assert list(waiting) == []
    assert collect(running, 1).choices[0].finish_reason == "length"
    settle(engine)
    assert engine.stats().kv_cache_usage == 0


def test_leaving_a_stream_early_aborts_it(tiny_engine: Engine):
    pieces = tiny_engine.stream("Once upon a time", temperature=0.0, **LONG)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    settle(tiny_engine)
    assert tiny_engine.stats().kv_cache_usage == 0


# queue


def test_a_full_queue_refuses_and_loses_nobody(start: Callable[..., Engine]):
    engine = start(max_num_seqs=1, max_queue=2)
    gate = Gate(engine)
    streams = [submit(engine, **SHORT)]
    assert gate.reached.wait(DEADLINE)
    streams += [submit(engine, **SHORT), submit(engine, **SHORT)]
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 2)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        submit(engine, **SHORT)
    gate.opened.set()
    assert [len(collect(stream, 1).choices[0].token_ids) for stream in streams] == [4, 4, 4]
    settle(engine)


def test_priority_goes_before_arrival(start: Callable[..., Engine]):
    engine = start(max_num_seqs=1)
    gate = Gate(engine)
    first = submit(engine, **SHORT)
    assert gate.reached.wait(DEADLINE)
    finished: list[str] = []
    original = engine._core._forget

    def drop(branch: Any) -> None:
        finished.append(engine._core._generations[branch].request.request_id)
        original(branch)

    engine._core._forget = drop  # type: ignore[method-assign]
    streams = [
        engine.submit(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=PROMPT,
                sampling=SamplingParams(**SHORT),
                priority=priority,
            )
        )
        for name, priority in (("last", 5), ("second", 0), ("first", -1), ("third", 0))
    ]
    gate.opened.set()
    for stream in [first, *streams]:
        collect(stream, 1)
    assert finished == ["test", "first", "second", "third", "last"]


# close


def test_closing_waits_for_those_who_run(start: Callable[..., Engine]):
    engine = start()
    stream = begin(engine, **LONG)
    engine.close(timeout=DEADLINE)
    deltas = [event for event in stream if isinstance(event, Delta)]
    assert deltas[-1].finish_reason == "length"
    assert engine.stats().kv_cache_usage == 0


def test_closing_at_once_tells_those_who_run_and_those_who_wait(start: Callable[..., Engine]):
    engine = start(max_num_seqs=1)
    running = begin(engine, **LONG)
    waiting = submit(engine, **LONG)
    engine.close()
    for stream in (running, waiting):
        with pytest.raises(EngineClosed, match="shutting down"):
            list(stream)


def test_a_closed_engine_refuses(tiny_engine: Engine):
    tiny_engine.close()
    tiny_engine.close(timeout=1.0)
    assert tiny_engine.is_closed
    with pytest.raises(EngineClosed, match="shutting down"):
        submit(tiny_engine)
    with pytest.raises(EngineClosed):
        tiny_engine.generate("Hello")


def test_an_engine_refuses_while_it_drains(start: Callable[..., Engine]):
    engine = start()
    gate = Gate(engine)
    stream = submit(engine, **SHORT)
    assert gate.reached.wait(DEADLINE)
    closer = threading.Thread(target=engine.close, args=(DEADLINE,))
    closer.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine.is_closed, DEADLINE)
    with pytest.raises(EngineClosed):
        submit(engine)
    gate.opened.set()
    closer.join(DEADLINE)
    assert collect(stream, 1).choices[0].finish_reason == "length"


# failures


def test_a_step_that_fails_takes_only_its_own_requests(start: Callable[..., Engine]):
    engine = start(max_num_seqs=2)
    expected = collect(submit(engine, **SHORT), 1).choices
    gate = Gate(engine)
    gate.next_error = RuntimeError("the device is on fire")
    in_the_step = [submit(engine, n=2, **LONG)]
    assert gate.reached.wait(DEADLINE)
    later = [submit(engine, **SHORT) for _ in range(3)]
    gate.opened.set()
    for stream in in_the_step:
        with pytest.raises(RequestFailed, match="the device is on fire"):
            list(stream)
    assert [collect(stream, 1).choices for stream in later] == [expected] * 3
    assert engine.stats().kv_cache_usage == 0
    assert not engine.is_closed


def test_a_failure_after_a_request_without_tokens_has_ended(start: Callable[..., Engine], monkeypatch: Any):
    """One request of the step asks for no tokens, so that it is done before the tokens of the other are chosen."""
    engine = start()
    gate = Gate(engine)
    held = submit(engine, **SHORT)
    assert gate.reached.wait(DEADLINE)
    scored, unlucky = submit(engine, max_tokens=0), submit(engine, **LONG)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no choice")

    monkeypatch.setattr(engine._core, "_pipeline", fail)
    gate.opened.set()
    for stream in (held, unlucky):
        with pytest.raises(RequestFailed, match="no choice"):
            list(stream)
    assert collect(scored, 1).choices[0].finish_reason == "length"
    monkeypatch.undo()
    settle(engine)
    assert engine.stats().kv_cache_usage == 0


def test_when_the_thread_dies_everyone_hears_of_it(start: Callable[..., Engine], monkeypatch: Any):
    engine = start(max_num_seqs=1)
    gate = Gate(engine)
    streams = [submit(engine, **LONG)]
    assert gate.reached.wait(DEADLINE)
    streams.append(submit(engine, **LONG))

    def fail() -> Any:
        raise ArithmeticError("a defect")

    monkeypatch.setattr(engine._core.scheduler, "schedule", fail)
    gate.opened.set()
    for stream in streams:
        with pytest.raises(EngineClosed, match="a defect") as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, ArithmeticError)
    with pytest.raises(EngineClosed, match="a defect"):
        submit(engine)
    engine.close(timeout=DEADLINE)


def test_a_request_with_nothing_left_to_choose_fails_alone(tiny_engine: Engine):
    (bad_word,) = tiny_engine.tokenizer.encode(" the")
    gate = Gate(tiny_engine)
    other = submit(tiny_engine, **SHORT)
    dead = submit(tiny_engine, allowed_token_ids=(bad_word,), bad_words=("the",), **SHORT)
    gate.opened.set()
    with pytest.raises(RequestError, match="no token to go on with") as caught:
        list(dead)
    assert caught.value.param == "allowed_token_ids"
    assert collect(other, 1).choices[0].finish_reason == "length"
    assert tiny_engine.stats().kv_cache_usage == 0


# streams


def test_a_stream_begins_with_the_prompt_and_ends_each_choice_once(tiny_engine: Engine):
    events = list(submit(tiny_engine, n=3, temperature=1.0, seed=5, logprobs=1, **SHORT))
    assert isinstance(events[0], PromptDone)
    assert (events[0].num_prompt_tokens, events[0].num_cached_tokens) == (len(PROMPT), 0)
    deltas = [event for event in events[1:] if isinstance(event, Delta)]
    assert len(deltas) == len(events) - 1
    for index in range(3):
        own = [delta for delta in deltas if delta.index == index]
        assert [delta.finish_reason for delta in own] == [None, None, None, "length"]
        assert all(delta.logprobs and delta.logprobs[0].token_id == delta.token_ids[0] for delta in own)


def test_async_iteration_of_many_streams_gives_the_same(tiny_engine: Engine):
    prompts = [range(start, start + 20 + start) for start in range(10, 70, 10)]

    async def answer(prompt: range) -> Completion:
        return collect([event async for event in submit(tiny_engine, prompt, **SHORT)], 1)

    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(answer(prompt) for prompt in prompts))

    waited_for = [collect(submit(tiny_engine, prompt, **SHORT), 1) for prompt in prompts]
    assert [each.choices for each in asyncio.run(all_at_once())] == [each.choices for each in waited_for]


def test_async_iteration_raises_what_went_wrong(tiny_engine: Engine):
    gate = Gate(tiny_engine)
    gate.next_error = RuntimeError("broken")
    gate.opened.set()

    async def consume() -> None:
        async for _ in submit(tiny_engine, **SHORT):
            pass

    with pytest.raises(RequestFailed, match="broken"):
        asyncio.run(consume())


def test_a_consumer_that_is_cancelled_can_abort(tiny_engine: Engine):
    gate = Gate(tiny_engine)
    stream = submit(tiny_engine, **LONG)

    async def consume() -> list[Any]:
        return [event async for event in stream]

    async def cancel_it() -> None:
        task = asyncio.create_task(consume())
        await asyncio.get_running_loop().run_in_executor(None, gate.reached.wait, DEADLINE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream.abort()

    asyncio.run(cancel_it())
    gate.opened.set()  # the loop is closed now: an answer to it must not trouble the engine
    settle(tiny_engine)
    assert tiny_engine.stats().kv_cache_usage == 0


def test_many_threads_submit_at_once(start: Callable[..., Engine]):
    engine = start(max_num_seqs=4)
    expected = collect(submit(engine, **SHORT), 1).choices
    found: list[Completion] = []

    def work() -> None:
        found.extend(collect(submit(engine, **SHORT), 1) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert [each.choices for each in found] == [expected] * 30
    stats = engine.stats()
    assert (stats.kv_cache_usage, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (31 * len(PROMPT), 31 * 4)
