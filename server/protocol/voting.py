"""The field `self_consistency`, which chat and completions share, and its translation to the engine's specification."""

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from cadenza.decoding.voting.answer import AnswerRule, FullText, LastNumber, Pattern, Pointer
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.server.protocol.wire import Wire

_NAMED: dict[str, type[FullText] | type[LastNumber]] = {"last_number": LastNumber, "full_text": FullText}
_WITH_TEXT: dict[str, type[Pattern] | type[Pointer]] = {"regex": Pattern, "json_pointer": Pointer}


def _answer(value: Any) -> str | tuple[str, str]:
    """The name of a rule, or (its name, its text)."""
    if isinstance(value, str) and value in _NAMED:
        return value
    given = [item for item in value.items() if item[1] is not None] if isinstance(value, dict) else []
    if len(given) != 1 or given[0][0] not in _WITH_TEXT:
        raise ValueError('must be "last_number", "full_text", {"regex": …} or {"json_pointer": …}.')
    name, text = given[0]
    if not isinstance(text, str):
        raise ValueError(f"must have a string as {name}.")
    return name, text


class SelfConsistencyFields(Wire):
    n: int
    answer: Annotated[str | tuple[str, str], PlainValidator(_answer)]
    weight: Literal["count", "logprob"] = "count"
    stop_when_decided: bool = True
    min_samples: int = 1
    confidence: float | None = None

    @cached_property
    def spec(self) -> SelfConsistency:
        """Raises RequestError."""
        return SelfConsistency(
            n=self.n,
            answer=self._rule,
            weight=self.weight,
            stop_when_decided=self.stop_when_decided,
            min_samples=self.min_samples,
            confidence=self.confidence,
        )

    @property
    def _rule(self) -> AnswerRule:
        if isinstance(self.answer, str):
            return _NAMED[self.answer]()
        name, text = self.answer
        return _WITH_TEXT[name](text)

    def check(self) -> None:
        _ = self.spec
