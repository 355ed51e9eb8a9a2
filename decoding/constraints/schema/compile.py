"""JSON Schema to grammar."""

from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.document import Document
from cadenza.decoding.constraints.schema.emitter import Emitter
from cadenza.decoding.constraints.schema.options import SchemaOptions
from cadenza.decoding.constraints.schema.productive import productive
from cadenza.decoding.constraints.schema.reader import Reader


def schema_grammar(schema: Any, options: SchemaOptions, effort: Effort) -> Grammar:
    """The JSON texts of the values that satisfy the schema. Raises ConstraintError with the place in the schema."""
    try:
        document = Document(schema, effort)
        emitter = Emitter(Reader(document, options, effort), options, effort)
        start = emitter.grammar_rules(document.start())
    except RecursionError:
        raise ConstraintTooComplex("the schema is nested too deeply") from None
    rules = productive(emitter.builder.rules, start, effort)
    if start not in rules:
        raise ConstraintError("no value satisfies the schema")
    return Grammar(start, rules)
