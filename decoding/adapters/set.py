"""The adapters of one request: which, how strong, and that they stay where they are until the request is over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from cadenza.decoding.request import RequestError

if TYPE_CHECKING:
    from cadenza.models.adapters.adapter import Adapter
    from cadenza.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a weighted set."""

    adapter: "Adapter"
    scale: float = 1.0


@dataclass(slots=True, eq=False)
class AdapterSet:
    """Immutable but for a count of its users: whoever acquires a set holds it once. Any thread may hold, release."""

    terms: tuple[Term, ...]
    """By digest, each once, no scale 0: equal sets are equal whatever order they were named in."""
    names: tuple[str, ...] = ()
    """As the request has named them, for metrics."""
    on_release: Callable[[Sequence["Adapter"]], None] | None = None
    """Called once, when nobody holds the set any more."""
    _num_holders: int = 1
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, *adapters: "Adapter") -> "AdapterSet":
        """Each at its full strength, for whoever has no names."""
        return cls(tuple(Term(adapter) for adapter in sorted(adapters, key=lambda adapter: adapter.digest)))

    @property
    def key(self) -> str:
        """What, beside the tokens, decides the content of the KV cache."""
        return " ".join(f"{term.adapter.digest}*{term.scale!r}" for term in self.terms)

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The one that an adapter of the set brings. Raises RequestError where two differ."""
        found = {
            id(tokenizer): tokenizer
            for term in self.terms
            if (tokenizer := term.adapter.tokenizer) is not None
        }
        if len(found) > 1:
            raise RequestError("lora names adapters that bring tokenizers of their own, which differ", "lora")
        return next(iter(found.values()), None)

    @property
    def num_tokens(self) -> int | None:
        """The size of the vocabulary, where an adapter adds tokens."""
        return max((term.adapter.num_tokens for term in self.terms if term.adapter.num_tokens), default=None)

    def hold(self) -> None:
        """One more user; for everyone who already holds it."""
        with self._lock:
            assert self._num_holders > 0
            self._num_holders += 1

    def release(self) -> None:
        with self._lock:
            self._num_holders -= 1
            is_last = self._num_holders == 0
        if is_last and self.on_release is not None:
            self.on_release([term.adapter for term in self.terms])
