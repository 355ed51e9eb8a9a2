"""Every keyword, case by case.

`keyword_cases.json` holds, by topic: schema, values that satisfy it, values that do not.
The table is itself checked against the `jsonschema` package, so a wrong entry cannot hide a wrong grammar.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cadenza.decoding.constraints.schema.keywords import ENFORCED

TOPICS: dict[str, list[Any]] = json.loads((Path(__file__).parent / "keyword_cases.json").read_text())
CASES = [case for cases in TOPICS.values() for case in cases]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=[json.dumps(c[0])[:60] for c in CASES])
def test_values(schema, valid, invalid, compiled, accepts_value):
    validator = jsonschema.Draft202012Validator(schema)
    grammar = compiled(schema)
    for value in valid:
        assert validator.is_valid(value), f"the table is wrong about {value!r}"
        assert accepts_value(grammar, value), value
    for value in invalid:
        assert not validator.is_valid(value), f"the table is wrong about {value!r}"
        assert not accepts_value(grammar, value), value


def test_no_keyword_is_without_a_case():
    used: set[str] = set()
    stack: list[Any] = [case[0] for case in CASES]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            used |= item.keys()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    # These are tested where drafts and formats are.
    assert ENFORCED.keys() - used <= {"additionalItems", "dependencies", "format"}
