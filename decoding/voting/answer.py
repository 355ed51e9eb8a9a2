"""What a sample answers: the rules that find an answer in its text.

A rule is a function of the text alone. Where it finds nothing the sample abstains. Patterns are the client's, so
that looking for them is bounded in time; one that takes longer fails its request, for an answer that depended on
the machine's load would not come out the same again. It knows no votes.
"""

import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import regex

from cadenza.decoding.request import RequestError
from cadenza.decoding.voting.canonical import NUMBER, as_number, canonical_text, one_line
from cadenza.decoding.voting.json_values import (
    canonical_json,
    json_text,
    read_pointer,
    resolve,
    values_in,
    whole_value,
)

_PARAM = "self_consistency.answer"
_LONGEST_PATTERN = 1000
_REGEX_SECONDS = 0.1
_NUMBER = re.compile(rf"(?<!\w)(?<![0-9][.]){NUMBER}")
"""Neither in the middle of a word nor of a version, such as 1.2.3."""


@dataclass(frozen=True, slots=True)
class Answer:
    key: str
    """Equal for equal answers, and a function of `text`."""
    text: str
    """For people: numbers in their canonical form, all else as the sample wrote it."""


class AnswerRule(Protocol):
    def __call__(self, text: str) -> Answer | None: ...


def answer_of(text: str) -> Answer | None:
    """A text that holds JSON is compared as that; white space alone answers nothing."""
    text = one_line(text)
    if text.startswith(("{", "[")):
        try:
            return Answer(canonical_json(whole_value(text)), text)
        except (ValueError, RecursionError):
            pass
    if (number := as_number(text)) is not None:
        return Answer(number, number)
    return Answer(canonical_text(text), text) if text else None


def _answer_of_json(value: Any) -> Answer | None:
    """A string answers what it holds, so that "42" equals 42; null answers nothing."""
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else json_text(value)
        text.encode()
    except (RecursionError, UnicodeEncodeError):  # half of a surrogate pair is no text
        return None
    return answer_of(text)


@dataclass(frozen=True, slots=True)
class FullText:
    """All of the text."""

    def __call__(self, text: str) -> Answer | None:
        return answer_of(text)


@dataclass(frozen=True, slots=True)
class LastNumber:
    """The last number of the text, as 1,234.50 or -3 or 1e3; a currency or a percent sign beside it says nothing."""

    def __call__(self, text: str) -> Answer | None:
        numbers = _NUMBER.findall(text)
        return answer_of(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Pointer:
    """What a JSON pointer (RFC 6901) leads to in the last JSON value of the text that it leads into."""

    pointer: str

    def __post_init__(self) -> None:
        _ = self._tokens

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        try:
            return read_pointer(self.pointer)
        except ValueError as error:
            param = f"{_PARAM}.json_pointer"
            raise RequestError(f"{param}: {error}, got {self.pointer!r}", param) from None

    def __call__(self, text: str) -> Answer | None:
        answer = None
        for value in values_in(text):
            try:
                answer = _answer_of_json(resolve(value, self._tokens))
            except LookupError:
                continue
        return answer


@dataclass(frozen=True)
class Pattern:
    """What the last match of a regular expression holds: its group named `answer`, else group 1, else all of it.

    Patterns are those of the `regex` package, which are Python's and more.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.pattern) <= _LONGEST_PATTERN:
            raise self._error(f"must have 1 to {_LONGEST_PATTERN} characters, got {len(self.pattern)}")
        _ = self._compiled

    @cached_property
    def _compiled(self) -> "regex.Pattern[str]":
        try:
            return regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError, KeyError, ValueError) as error:
            raise self._error(f"is not a regular expression: {error}") from None

    def _error(self, rule: str) -> RequestError:
        param = f"{_PARAM}.regex"
        return RequestError(f"{param} {rule}", param)

    def __call__(self, text: str) -> Answer | None:
        """Raises RequestError if it takes too long."""
        compiled, found = self._compiled, None
        group: str | int = "answer" if "answer" in compiled.groupindex else min(1, compiled.groups)
        deadline = time.monotonic() + 2 * _REGEX_SECONDS
        try:
            for match in compiled.finditer(text, timeout=_REGEX_SECONDS):
                found = found if match[group] is None else match[group]
                if time.monotonic() > deadline:
                    raise TimeoutError
        except TimeoutError:
            raise self._error(f"takes longer than {_REGEX_SECONDS} s to look for in an answer") from None
        return None if found is None else answer_of(found)
