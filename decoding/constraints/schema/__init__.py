"""JSON Schema to grammar: exact, or refused by name."""

from cadenza.decoding.constraints.schema.compile import schema_grammar
from cadenza.decoding.constraints.schema.options import SchemaOptions
from cadenza.decoding.constraints.schema.strict import check_strict

__all__ = ["SchemaOptions", "check_strict", "schema_grammar"]
