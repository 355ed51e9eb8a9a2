"""Access to the keywords of one schema: values of the right kind, or an error that names the place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.document import Document, Node
from cadenza.decoding.constraints.schema.formula import Formula
from cadenza.decoding.constraints.schema.options import SchemaOptions
from cadenza.decoding.constraints.schema.shape import Algebra, Shape

LONGEST = 2**24
"""No text that is ever generated has so many characters, items or members; a larger bound bounds nothing."""


@dataclass(slots=True)
class Context:
    """What reading any schema needs."""

    document: Document
    options: SchemaOptions
    effort: Effort
    algebra: Algebra
    shape: Callable[[Formula], Shape]
    """The shape of another schema that speaks of the same value."""
    is_empty_shape: Callable[[Shape], bool]
    """Certainly empty; False when in doubt."""
    prune: Callable[[Shape], Shape]
    marks_evaluated: bool
    """Whether parts keep what was evaluated, because some schema of the document asks."""


@dataclass(frozen=True, slots=True)
class Keywords:
    """The members of one schema object."""

    node: Node
    context: Context

    @property
    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = self.node.schema
        return schema

    def __contains__(self, keyword: str) -> bool:
        return keyword in self.schema

    def where(self, *path: str | int) -> str:
        return "/".join(
            (self.node.where, *(str(step).replace("~", "~0").replace("/", "~1") for step in path))
        )

    def wrong(self, keyword: str, message: str) -> ConstraintError:
        return ConstraintError(f"{keyword} {message}", self.where(keyword))

    def count(self, keyword: str) -> int | None:
        """A number of things. None: absent, or so large that it bounds nothing that can be written."""
        value = self.schema.get(keyword)
        if value is None and keyword not in self:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(keyword, "must be a non-negative integer")
        return value

    def least(self, keyword: str) -> int:
        return self.count(keyword) or 0

    def most(self, keyword: str) -> int | None:
        value = self.count(keyword)
        return None if value is None or value >= LONGEST else value

    def number(self, keyword: str) -> int | float | None:
        if keyword not in self:
            return None
        value = self.schema[keyword]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(keyword, "must be a number")
        return value

    def text(self, keyword: str) -> str | None:
        if keyword not in self:
            return None
        value = self.schema[keyword]
        if not isinstance(value, str):
            raise self.wrong(keyword, "must be a string")
        return value

    def names(self, keyword: str) -> list[str]:
        return _names(self.schema.get(keyword, []), keyword, self.where(keyword))

    def schemas(self, keyword: str) -> list[Any]:
        value = self.schema.get(keyword, [])
        if not isinstance(value, list) or (keyword in self and not value):
            raise self.wrong(keyword, "must be an array that is not empty")
        return value

    def mapping(self, keyword: str) -> dict[str, Any]:
        value = self.schema.get(keyword, {})
        if not isinstance(value, dict):
            raise self.wrong(keyword, "must be an object")
        return value

    def subschema(self, *path: str | int) -> Formula:
        """The schema at a path that is known to exist."""
        schema: Any = self.schema
        for step in path:
            schema = schema[step]
        return self.context.document.child(self.node, *path, schema=schema)

    def names_at(self, *path: str) -> list[str]:
        value: Any = self.schema
        for step in path:
            value = value[step]
        return _names(value, path[0], self.where(*path))

    def reference(self) -> Formula:
        context = self.context
        schema, where, base = context.document.resolve(self.schema["$ref"], self.node.where, self.node.base)
        return context.document.formula(schema, where, base)

    def synthetic(self, schema: Any, *path: str | int) -> Formula:
        """A schema that is not in the document but says what stands at `path`."""
        return self.context.document.formula(schema, self.where(*path), "\0")


def _names(value: Any, keyword: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConstraintError(f"{keyword} must be an array of strings", where)
    return list(dict.fromkeys(value))
