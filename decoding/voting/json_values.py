"""JSON in what models write: the values in a text, the way a pointer leads into one, and when two are equal.

Values are read with exact numbers. Everything is bounded: a text that is hard to read has no value.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from cadenza.decoding.voting.canonical import canonical_number, canonical_text

_MOST_EFFORT = 1_000_000
"""Characters read in vain, after which a text's remaining values are not looked for."""
_FAILURE, _DEEP_FAILURE = 100, 5_000
"""What giving up costs, in characters."""
_LONGEST_PREFIX = 4096
_OPENING = re.compile(r"[{\[]")


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse)


def whole_value(text: str) -> Any:
    """The value that the text is. Raises ValueError."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None


def values_in(text: str) -> Iterator[Any]:
    """The JSON value that the text is, or else the outermost objects and arrays in it, in order."""
    try:
        yield whole_value(text)
        return
    except ValueError:
        pass
    position, effort = _next_opening(text, 0), 0
    while position >= 0 and effort < _MOST_EFFORT:
        if position > _LONGEST_PREFIX:  # an error counts the lines before it
            text, position = text[position:], 0
        try:
            value, end = _DECODER.raw_decode(text, position)
            yield value
        except json.JSONDecodeError as error:
            effort, end = effort + error.pos - position + _FAILURE, position + 1
        except (ValueError, RecursionError):
            effort, end = effort + _DEEP_FAILURE, position + 1
        position = _next_opening(text, end)


def _next_opening(text: str, start: int) -> int:
    found = _OPENING.search(text, start)
    return -1 if found is None else found.start()


def read_pointer(pointer: str) -> tuple[str, ...]:
    """The reference tokens of a JSON pointer (RFC 6901). Raises ValueError."""
    if pointer and not pointer.startswith("/"):
        raise ValueError("a JSON pointer is empty or begins with /")
    tokens = pointer.split("/")[1:]
    for token in tokens:
        if "~" in token.replace("~0", "").replace("~1", ""):
            raise ValueError("in a JSON pointer ~ is written ~0, and / in a name ~1")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in tokens)


def resolve(value: Any, tokens: Sequence[str]) -> Any:
    """What the pointer of `tokens` leads to. Raises LookupError."""
    for token in tokens:
        if isinstance(value, dict):
            value = value[token]
        elif isinstance(value, list) and _is_index(token):
            value = value[int(token)]
        else:
            raise LookupError(token)
    return value


def _is_index(token: str) -> bool:
    return token.isascii() and token.isdecimal() and len(token) < 10 and (token == "0" or token[0] != "0")


def canonical_json(value: Any) -> str:
    """Equal for equal values: whatever the order of members, the form of numbers, the case and spaces of strings."""
    return _write(value, canonical_text)


def json_text(value: Any) -> str:
    """The value in compact JSON."""
    return _write(value, str)


def _write(value: Any, string: Callable[[str], str]) -> str:
    match value:
        case dict():
            members = {json.dumps(name, ensure_ascii=False): _write(value[name], string) for name in value}
            return "{" + ",".join(f"{name}:{members[name]}" for name in sorted(members)) + "}"
        case list():
            return "[" + ",".join(_write(item, string) for item in value) + "]"
        case str():
            return json.dumps(string(value), ensure_ascii=False)
        case Decimal():
            return canonical_number(value)
        case _:
            return json.dumps(value)
