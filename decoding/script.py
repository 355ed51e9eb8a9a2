"""The engine for scripts: prompts in, whole answers or pieces of text out."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.completion import Completion, Prompt, collect, prompt_token_ids
from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import constraint_spec
from cadenza.decoding.request import Delta, GenerationRequest, RequestError, SamplingParams
from cadenza.decoding.strategies.spec import StrategySpec, is_search, search_defaults
from cadenza.decoding.stream import RequestStream
from cadenza.models import LoadedModel

Adapters = str | Mapping[str, float] | Sequence[tuple[str, float]] | None
"""An adapter's name, or the scales of several by their names."""


class ScriptMethods(ABC):
    """What an engine offers beside `submit`, by means of it."""

    model: LoadedModel
    adapters: AdapterLibrary | None
    constraints: ConstraintCompiler

    @abstractmethod
    def submit(self, request: GenerationRequest) -> RequestStream: ...

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
        if isinstance(adapter, str):
            adapter = {adapter: 1.0}
        terms = list(adapter.items() if isinstance(adapter, Mapping) else adapter)
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

    def _request(self, prompt: Prompt, shared: dict[str, Any]) -> GenerationRequest:
        adapters: AdapterSet | None = shared["adapters"]
        own = None if adapters is None else adapters.tokenizer
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt_token_ids(own or self.model.tokenizer, prompt),
            **shared,
        )
