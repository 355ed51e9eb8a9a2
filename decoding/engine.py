"""The engine: its own thread behind a narrow interface of submit, abort and a stream of events.

`submit` checks a request against the model and queues it; the thread takes new requests and aborts between
steps, so that an abort frees its blocks before the next forward pass. `generate` and `stream` are the same for
scripts.
"""

import logging
import secrets
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.runtime import AdapterRuntime
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.adapters.start import load_modules
from cadenza.decoding.adapters.weights import EngineWeights
from cadenza.decoding.admission import admit
from cadenza.decoding.assembly import Assembly, assemble
from cadenza.decoding.completion import Completion, Prompt, collect, prompt_token_ids
from cadenza.decoding.config import EngineConfig
from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import constraint_spec
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.decoding.core import EngineCore
from cadenza.decoding.generation import Generation
from cadenza.decoding.request import (
    Delta,
    EngineClosed,
    GenerationRequest,
    QueueFull,
    RequestError,
    SamplingParams,
)
from cadenza.decoding.strategies.spec import StrategySpec, is_search, search_defaults
from cadenza.decoding.stream import RequestStream
from cadenza.models import LoadConfig, LoadedModel, Tokenizer, load_model
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.read import read_adapter

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Adapters = str | Mapping[str, float] | None
"""An adapter's name, or the scales of several by their names."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    """Requests with a branch in the batch."""
    num_waiting: int
    kv_cache_usage: float
    """Share of the blocks that some branch holds, 0 … 1."""
    prefix_cache_queries: int
    """Tokens looked up."""
    prefix_cache_hits: int
    """Tokens found."""
    prompt_tokens_total: int
    generation_tokens_total: int
    num_preemptions: int
    spec_decode_num_drafts: int
    """Times that tokens were drafted for a branch."""
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
    running_adapters: tuple[str, ...]
    """Names that requests with a branch in the batch have asked for, each once."""
    waiting_adapters: tuple[str, ...]
    """Those of branches that wait."""


class Engine:
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
            self.adapters = self._library(assembly.adapters)
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

    def generate(
        self,
        prompt: Prompt,
        *,
        constraint: Any = None,
        strategy: StrategySpec | None = None,
        adapter: Adapters = None,
        explain: bool = False,
        **sampling: Any,
    ) -> Completion:
        """The whole answer. prompt: text, token ids, or chat messages; sampling: fields of SamplingParams.

        constraint: what the answer must be: a ConstraintSpec, one of outlines' types, a pydantic model, a Python
        type, or a JSON schema as a dict. Raises ConstraintError where that cannot be enforced.
        strategy: BeamSearch, ContrastiveSearch, BestOf or SelfConsistency. adapter: a name among `adapters`, or names
        with their scales. explain: say of every token why it came.
        """
        return self.generate_batch(
            [prompt], constraint=constraint, strategy=strategy, adapter=adapter, explain=explain, **sampling
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        constraint: Any = None,
        strategy: StrategySpec | None = None,
        adapter: Adapters = None,
        explain: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """The answers to several prompts, computed together."""
        with self._acquired(adapter) as adapters:
            shared = self._shared(sampling, constraint, strategy, adapters, explain=explain)
            streams = [self.submit(self._request(prompt, shared)) for prompt in prompts]
        return [collect(stream, shared["sampling"].n) for stream in streams]

    def stream(
        self,
        prompt: Prompt,
        *,
        constraint: Any = None,
        strategy: StrategySpec | None = None,
        adapter: Adapters = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The text of the answer, piece by piece. Leaving the loop early stops the request."""
        with self._acquired(adapter) as adapters:
            shared = self._shared({**sampling, "n": 1}, constraint, strategy, adapters, explain=False)
            stream = self.submit(self._request(prompt, shared))
        try:
            for event in stream:
                if isinstance(event, Delta) and event.text:
                    yield event.text
        finally:
            stream.abort()

    @contextmanager
    def _acquired(self, adapter: Adapters) -> Iterator[AdapterSet | None]:
        """The adapters of these names, for as long as the block lasts."""
        if not adapter:
            yield None
            return
        if self.adapters is None:
            raise RequestError("this engine takes no adapters: enable_lora is off", "lora")
        terms = [(adapter, 1.0)] if isinstance(adapter, str) else list(adapter.items())
        adapters = self.adapters.acquire(terms).result()
        try:
            yield adapters
        finally:
            adapters.release()

    def _shared(
        self,
        sampling: dict[str, Any],
        constraint: Any,
        strategy: StrategySpec | None,
        adapters: AdapterSet | None,
        *,
        explain: bool,
    ) -> dict[str, Any]:
        """The fields that the requests of one call have in common."""
        defaults = self.model.sampling_defaults
        if is_search(strategy):
            defaults = search_defaults(defaults)
        return {
            "sampling": SamplingParams(**{**defaults, **sampling}),
            "constraint": self._constraint(constraint),
            "strategy": strategy,
            "adapters": adapters,
            "explain": explain,
        }

    def _constraint(self, constraint: Any) -> Constraint | None:
        if constraint is None:
            return None
        return self.constraints.compile(constraint_spec(constraint)).result()

    def _vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Without and with the model's added tokens as text."""
        size = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        plain, with_added = (
            Vocabulary.from_tokenizer(self.tokenizer, self.model.eos_token_ids, size, with_added=added)
            for added in (False, True)
        )
        return plain, plain if with_added.fingerprint == plain.fingerprint else with_added

    def _request(self, prompt: Prompt, shared: dict[str, Any]) -> GenerationRequest:
        adapters: AdapterSet | None = shared["adapters"]
        own = None if adapters is None else adapters.tokenizer
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt_token_ids(own or self.tokenizer, prompt),
            **shared,
        )

    # adapters

    def _library(self, runtime: AdapterRuntime) -> AdapterLibrary:
        weights = EngineWeights(runtime.weights, runtime.layout, self._call)

        def read(path: str) -> Adapter:
            return read_adapter(
                Path(path),
                runtime.layout,
                weights,
                self.tokenizer,
                max_rank=self.config.max_lora_rank,
                fingerprint=self.model.fingerprint,
            )

        def warm(adapter: Adapter) -> None:
            self._call(partial(runtime.warm, adapter)).result()

        return AdapterLibrary(read, max_in_memory=self.config.adapters_in_memory, warm=warm)

    def _call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run it on the engine's thread, between two steps."""
        future: Future[Result] = Future()
        with self._changed:
            self._require_open()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    # state

    def stats(self) -> EngineStats:
        core = self._core
        in_batch, in_line = list(core.scheduler.running), list(core.scheduler.waiting)
        running = {branch.order[1] for branch in in_batch}
        waiting = {branch.order[1] for branch in in_line} - running
        return EngineStats(
            num_running=len(running),
            num_waiting=len(waiting) + len(self._inbox),
            kv_cache_usage=core.pool.num_held / core.pool.num_blocks,
            prefix_cache_queries=core.scheduler.prefix_cache_queries,
            prefix_cache_hits=core.scheduler.prefix_cache_hits,
            prompt_tokens_total=core.tokens.prompt,
            generation_tokens_total=core.tokens.generated,
            num_preemptions=core.scheduler.num_preemptions,
            spec_decode_num_drafts=core.speculation.num_drafts,
            spec_decode_num_draft_tokens=core.speculation.num_draft_tokens,
            spec_decode_num_accepted_tokens=core.speculation.num_accepted_tokens,
            running_adapters=_named(branch.adapters for branch in in_batch),
            waiting_adapters=_named(branch.adapters for branch in in_line),
        )

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
            arrived, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, []
            if self._stop_now:
                return False
            for generation in arrived:
                core.add(generation)
            call = self._calls.popleft() if self._calls else None
        for generation in aborted:
            core.remove(generation)
            _release(generation)
        if call is not None:  # one at a time, so that nobody's tokens wait for all of them
            _answer(*call)
        return True

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


def _named(sets: Iterable[AdapterSet | None]) -> tuple[str, ...]:
    return tuple(sorted({name for adapters in sets if adapters is not None for name in adapters.names}))
