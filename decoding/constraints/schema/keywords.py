"""Which keywords of JSON Schema are enforced, which say nothing about validity, and which are refused.

The documentation's table is made from these. A name in none of them is nobody's keyword; the specification says to
ignore it. A keyword is enforced whatever draft `$schema` names: who writes `const` in a schema of draft 4 means it.
"""

ENFORCED: dict[str, str] = {
    "type": "", "enum": "", "const": "",
    "minimum": "", "maximum": "", "exclusiveMinimum": "", "exclusiveMaximum": "",
    "multipleOf": "decimal arithmetic: 0.07 is a multiple of 0.01",
    "minLength": "", "maxLength": "", "pattern": "ECMA-262, without look-around and back-references",
    "format": "the names in the table of formats; any other is refused",
    "prefixItems": "", "items": "", "additionalItems": "", "minItems": "", "maxItems": "",
    "uniqueItems": "where the items have a few possible values, or there is at most one item",
    "contains": "", "minContains": "", "maxContains": "",
    "properties": "", "patternProperties": "", "additionalProperties": "", "propertyNames": "", "required": "",
    "minProperties": "above one only where it does not count undeclared keys", "maxProperties": "",
    "dependencies": "", "dependentRequired": "", "dependentSchemas": "",
    "allOf": "", "anyOf": "", "oneOf": "", "not": "", "if": "", "then": "", "else": "",
    "unevaluatedProperties": "", "unevaluatedItems": "not beside contains",
    "$ref": "within the schema",
}  # fmt: skip
"""Keyword to what is particular about it."""

ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "$vocabulary",
        "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
        "contentEncoding", "contentMediaType", "contentSchema",
        "discriminator", "externalDocs", "xml", "$recursiveAnchor", "$dynamicAnchor",
    }
)  # fmt: skip

REFUSED: dict[str, str] = {
    "$dynamicRef": "",
    "$recursiveRef": "",
    "extends": "of draft 3",
    "disallow": "of draft 3",
    "divisibleBy": "of draft 3",
}

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
