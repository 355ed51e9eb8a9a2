"""The engine: its own thread behind a narrow interface of submit, abort and a stream of events.

`submit` checks a request against the model and queues it; the thread takes new requests and aborts between
steps, so that an abort frees its blocks before the next forward pass.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.start import load_modules, open_library
from cadenza.decoding.admission import admit
from cadenza.decoding.assembly import Assembly, assemble
from cadenza.decoding.config import EngineConfig
from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.decoding.core import EngineCore
from cadenza.decoding.generation import Generation
from cadenza.decoding.request import EngineClosed, GenerationRequest, QueueFull, SamplingParams
from cadenza.decoding.script import ScriptMethods
from cadenza.decoding.stats import EngineStats, stats_of
from cadenza.decoding.stream import RequestStream
from cadenza.models import LoadConfig, LoadedModel, Tokenizer, load_model

log = logging.getLogger(__name__)

_CALL_SECONDS = 0.01  # between two steps

Result = TypeVar("Result")


class Engine(ScriptMethods):
    """Serves one model. Raises `ModelError` where the model or the configuration cannot work.

    Takes the model over: its attention and, on a CPU, its linear layers are replaced in place.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig = EngineConfig(), draft: LoadedModel | None = None
    ) -> None:
        """draft: what `config.speculative` names, if it is loaded already."""
        if draft is None and config.draft_source is not None:
            dtype: Any = str(model.dtype).removeprefix("torch.")
            draft = load_model(config.draft_source, LoadConfig(dtype=dtype, device=str(model.device)))
        self.model = model
        self._draft = draft
        self.config = config
        self._changed = threading.Condition()
        self._inbox: list[Generation] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._aborted: list[Generation] = []
        self._active: dict[RequestStream, Generation] = {}
        self._num_submitted = 0
        self._closed: Exception | None = None
        self._stop_now = False
        self.constraints = ConstraintCompiler(self._vocabularies, model.tokenizer.encode_bytes)
        """Compiles what requests may carry as their constraint."""
        assembled: Future[Assembly] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(assembled,), name="cadenza-engine", daemon=True
        )
        self._thread.start()
        assembly = assembled.result()
        self._core = assembly.core
        self.memory = assembly.memory
        """How the memory was divided, and why."""
        self.num_kv_tokens, self.max_model_len = self.memory.num_tokens, self.memory.max_model_len
        self.description = assembly.description
        """Precision, memory, operators: what a start-up report tells."""
        self.adapters: AdapterLibrary | None = None
        """What requests may name; None: the engine takes no adapters."""
        if assembly.adapters is not None:
            self.adapters = open_library(assembly.adapters, self._call, model, config)
            try:
                load_modules(self.adapters, config.lora_modules)
            except BaseException:
                self.close()
                raise
        log.info("engine ready: %s", self.description)

    @classmethod
    def load(
        cls, source: str, load: LoadConfig = LoadConfig(), config: EngineConfig = EngineConfig()
    ) -> "Engine":
        """An engine for `source`: an alias, a Hugging Face id, a local folder or a `.gguf` file."""
        return cls(load_model(source, load, config.step_needs), config)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def is_closed(self) -> bool:
        """No more requests are taken: `close` was called, or the thread has died."""
        return self._closed is not None

    # requests

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request; returns at once, from any thread.

        Raises RequestError (the request cannot be served as asked), QueueFull, EngineClosed.
        """
        with self._changed:
            number = self._num_submitted
            self._num_submitted += 1
        stream = RequestStream(request.request_id, self._abort)
        generation = admit(
            request,
            model=self.model,
            config=self.config,
            max_model_len=self.max_model_len,
            num_kv_tokens=self.num_kv_tokens,
            arrival=number,
            seed=self._seed(request.sampling, number),
            stream=stream,
        )
        with self._changed:
            self._require_open()
            if len(self._inbox) + self._num_waiting() >= self.config.max_queue:
                raise QueueFull(f"{self.config.max_queue} requests are waiting already; try again later")
            if request.adapters is not None:
                request.adapters.hold()
            self._active[stream] = generation
            self._inbox.append(generation)
            self._changed.notify_all()
        return stream

    def _require_open(self) -> None:
        if self._closed is not None:
            raise EngineClosed(str(self._closed)) from self._closed

    def _seed(self, sampling: SamplingParams, number: int) -> int:
        if sampling.seed is not None:
            return sampling.seed
        return secrets.randbits(64) if self.config.seed is None else self.config.seed + number

    def _abort(self, stream: RequestStream) -> None:
        with self._changed:
            generation = self._active.pop(stream, None)
            if generation is not None:
                self._aborted.append(generation)
                self._changed.notify_all()

    def _call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run it on the engine's thread, between two steps."""
        future: Future[Result] = Future()
        with self._changed:
            self._require_open()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def _vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Without and with the model's added tokens as text."""
        size = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        plain, with_added = (
            Vocabulary.from_tokenizer(self.tokenizer, self.model.eos_token_ids, size, with_added=added)
            for added in (False, True)
        )
        return plain, plain if with_added.fingerprint == plain.fingerprint else with_added

    # state

    def stats(self) -> EngineStats:
        return stats_of(self._core, len(self._inbox))

    def _num_waiting(self) -> int:
        return len({branch.order[1] for branch in list(self._core.scheduler.waiting)})

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompts that no running request uses. Only between requests."""
        self._core.pool.reset_cache()

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `timeout` seconds, then end the thread."""
        with self._changed:
            self._closed = self._closed or EngineClosed("the engine is shutting down")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._active or not self._thread.is_alive(), timeout)
            self._stop_now = True
            self._changed.notify_all()
        self._thread.join()
        if self.adapters is not None:
            self.adapters.close()
        self.constraints.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the engine's thread

    def _main(self, assembled: "Future[Assembly]") -> None:
        """All of torch's work is done on this one thread: a second one that computes would get worker threads of its
        own from OpenMP, which then waits for work in a slower way (a fifth of the time of a token on two cores)."""
        try:
            assembly = assemble(self.model, self.config, self._draft)
        except BaseException as error:
            assembled.set_exception(error)
            return
        assembled.set_result(assembly)
        self._run(assembly.core)

    def _run(self, core: EngineCore) -> None:
        try:
            while self._take_messages(core):
                if core.has_work:
                    core.step()
                self._forget_finished()
            reason: Exception = EngineClosed("the engine is shutting down")
        except BaseException as error:  # a defect of ours: everyone who waits must hear of it
            log.exception("the engine's thread has died")
            reason = EngineClosed(f"the engine has died: {error!r}")
            reason.__cause__ = error
        self._end(core, reason)

    def _take_messages(self, core: EngineCore) -> bool:
        """Wait for work, take what has come in; False: it is time to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stop_now or self._inbox or self._aborted or self._calls or core.has_work
            )
            if self._stop_now:  # `_end` answers all that is here
                return False
            arrived, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, []
            for generation in arrived:
                core.add(generation)
        for generation in aborted:
            core.remove(generation)
            _release(generation)
        self._take_calls()
        return True

    def _take_calls(self) -> None:
        """Answer those that came, but not for long while somebody waits for tokens."""
        end = time.perf_counter() + _CALL_SECONDS
        while self._calls and time.perf_counter() < end:
            _answer(*self._calls.popleft())

    def _forget_finished(self) -> None:
        with self._changed:
            finished = [self._active.pop(stream) for stream in list(self._active) if stream.is_closed]
            self._changed.notify_all()
        for generation in finished:
            _release(generation)

    def _end(self, core: EngineCore, reason: Exception) -> None:
        with self._changed:
            self._closed = reason
            active, aborted, calls = dict(self._active), self._aborted, list(self._calls)
            self._aborted = []
            for waiting in (self._active, self._calls):
                waiting.clear()
            self._changed.notify_all()
        core.fail_all(reason)
        for stream in active:
            stream.close(reason)
        for generation in (*active.values(), *aborted):
            _release(generation)
        for _, future in calls:
            future.set_exception(reason)


def _release(generation: Generation) -> None:
    """The request is over."""
    if generation.request.adapters is not None:
        generation.request.adapters.release()


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        value = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)
