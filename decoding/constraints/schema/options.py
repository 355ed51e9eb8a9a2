"""How JSON is to be written, apart from what the schema says. Knows nothing of schemas."""

from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import Expression


@dataclass(frozen=True, slots=True)
class SchemaOptions:
    whitespace: Expression | None = None
    """What may stand between the tokens of JSON. None: nothing, a space, or a line break with indentation, where
    people put it, so that a weak model cannot run away in blanks. EPSILON: compact. Anything else stands around
    every bracket, comma and colon, and must match whitespace only."""
    additional_properties: bool = True
    """False: an object with `properties` or `patternProperties` and no word on additional ones allows none."""
    format_assertion: bool = True
    """False: `format` is an annotation."""
