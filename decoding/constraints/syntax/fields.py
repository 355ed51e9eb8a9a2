"""Fields of JSON objects, checked as they are read; errors name the place as a JSON pointer."""

from dataclasses import dataclass, field
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError


@dataclass(slots=True)
class Fields:
    value: Any
    path: str
    _read: set[str] = field(default_factory=lambda: {"type"})

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise ConstraintError("an object is expected", self.path)

    def error(self, message: str, name: str | None = None) -> ConstraintError:
        return ConstraintError(message, self.path if name is None else f"{self.path}/{name}")

    def has(self, name: str) -> bool:
        return name in self.value

    def is_given(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.has(name) and self.any(name) is not None

    def any(self, name: str) -> Any:
        self._read.add(name)
        if name not in self.value:
            raise self.error(f"the field {name!r} is missing")
        return self.value[name]

    def text(self, name: str, *, may_be_empty: bool = True) -> str:
        return self._text(self.any(name), name, may_be_empty)

    def texts(self, name: str) -> list[str]:
        """A list, none of them empty; an absent one is empty."""
        values = self.list(name) if self.has(name) else []
        return [self._text(value, f"{name}/{number}", False) for number, value in enumerate(values)]

    def list(self, name: str) -> list[Any]:
        value = self.any(name)
        if not isinstance(value, list):
            raise self.error("a list is expected", name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.any(name) if self.has(name) else default
        if not isinstance(value, bool):
            raise self.error("true or false is expected", name)
        return value

    def integer(self, name: str) -> int:
        value = self.any(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error("an integer is expected", name)
        return value

    def finish(self) -> None:
        """Refuse what was not read: a field without effect is a misunderstanding."""
        for name in self.value:
            if name not in self._read:
                raise self.error(f"the field {name!r} is not supported", name)

    def _text(self, value: Any, name: str, may_be_empty: bool) -> str:
        if not isinstance(value, str):
            raise self.error("a string is expected", name)
        if not value and not may_be_empty:
            raise self.error("the string is empty", name)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error("the string contains half of a surrogate pair", name)
        return value
