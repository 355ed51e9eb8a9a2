"""From schemas to shapes: what each keyword, and all of them together, say about one value."""

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.document import Document, Node
from cadenza.decoding.constraints.schema.emptiness import Emptiness
from cadenza.decoding.constraints.schema.formula import Formula
from cadenza.decoding.constraints.schema.keywords import REFUSED
from cadenza.decoding.constraints.schema.options import SchemaOptions
from cadenza.decoding.constraints.schema.read_arrays import read_arrays
from cadenza.decoding.constraints.schema.read_logic import read_logic
from cadenza.decoding.constraints.schema.read_objects import read_objects
from cadenza.decoding.constraints.schema.read_scalars import (
    read_numbers,
    read_strings,
    read_type,
    read_values,
)
from cadenza.decoding.constraints.schema.reading import Context, Keywords
from cadenza.decoding.constraints.schema.shape import ANYTHING, NOTHING, Algebra, Shape
from cadenza.decoding.constraints.schema.unevaluated import is_used, read_unevaluated

_NUMERIC = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_TEXTUAL = frozenset({"minLength", "maxLength", "pattern", "format"})
_ON_ARRAYS = frozenset(
    {
        "prefixItems", "items", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains",
        "maxContains",
    }
)  # fmt: skip
_ON_OBJECTS = frozenset(
    {
        "properties", "patternProperties", "additionalProperties", "propertyNames", "required", "minProperties",
        "maxProperties", "dependencies", "dependentRequired", "dependentSchemas",
    }
)  # fmt: skip
_READERS = (
    (frozenset({"type"}), read_type),
    (frozenset({"const", "enum"}), read_values),
    (_NUMERIC, read_numbers),
    (_TEXTUAL, read_strings),
    (_ON_ARRAYS, read_arrays),
    (_ON_OBJECTS, read_objects),
)

_MAX_OPEN = 64
"""Schemas about one value that may lie within each other by `allOf`, `not`, `$ref` and their like."""


class Reader:
    """Shapes of formulas, each expanded once."""

    def __init__(self, document: Document, options: SchemaOptions, effort: Effort) -> None:
        self.document = document
        self.effort = effort
        self.algebra = Algebra(effort, document.single)
        self.emptiness = Emptiness(self.shape_elsewhere, effort)
        self._context = Context(
            document,
            options,
            effort,
            self.algebra,
            self.shape,
            self.emptiness.is_empty_shape,
            self.emptiness.prune,
            is_used(document.root),
        )
        self._shapes: dict[tuple[int, bool], Shape] = {}
        self._open: set[int] = set()
        """Schemas that are being read and speak of the same value as the one that is read now."""
        self._outer: set[int] = set()
        """Schemas that are being read and speak of a value around."""

    def shape(self, formula: Formula) -> Shape:
        shape = ANYTHING
        for schema, holds in sorted(formula):
            shape = self.algebra.intersection(shape, self._literal(schema, holds))
        return shape

    def shape_elsewhere(self, formula: Formula) -> Shape | None:
        """The shape of another value. None: it depends on what is being read."""
        if any(schema in self._open or schema in self._outer for schema, _ in formula):
            return None
        open_, outer = self._open, self._outer
        self._open, self._outer = set(), open_ | outer
        try:
            return self.shape(formula)
        except _Unfinished:
            return None
        finally:
            self._open, self._outer = open_, outer

    def _literal(self, schema: int, holds: bool) -> Shape:
        key = (schema, holds)
        if key not in self._shapes:
            node = self.document.nodes[schema]
            if schema in self._outer:
                raise _Unfinished
            if schema in self._open:
                raise ConstraintError("$ref leads back to itself", node.where)
            self._open.add(schema)
            if len(self._open) + len(self._outer) > _MAX_OPEN:
                raise ConstraintTooComplex(f"more than {_MAX_OPEN} schemas lie within each other", node.where)
            try:
                self._shapes[key] = (
                    self._node(node) if holds else self.algebra.complement(self._literal_open(schema))
                )
            finally:
                self._open.discard(schema)
        return self._shapes[key]

    def _literal_open(self, schema: int) -> Shape:
        if (schema, True) not in self._shapes:
            self._shapes[schema, True] = self._node(self.document.nodes[schema])
        return self._shapes[schema, True]

    def _node(self, node: Node) -> Shape:
        self.effort.spend(8)
        if node.formula is not None:
            return self.shape(node.formula)
        if node.schema is False:
            return NOTHING
        return self._keywords(Keywords(node, self._context))

    def _keywords(self, keywords: Keywords) -> Shape:
        schema = keywords.schema
        if "$ref" in schema and self.document.draft <= 7:
            return self.shape(keywords.reference())
        shape = ANYTHING
        for names, read in _READERS:
            if not names.isdisjoint(schema):
                shape = self.algebra.intersection(shape, read(keywords))
        for keyword in schema.keys() & REFUSED.keys():
            raise ConstraintError(f"{keyword} is not supported", keywords.where(keyword))
        return read_unevaluated(keywords, read_logic(keywords, shape))


class _Unfinished(Exception):
    """A schema was asked for whose reading has begun further out."""
