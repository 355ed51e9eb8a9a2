"""Schemas that people wrote, with instances that a validator has judged. They are not part of the repository."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cadenza.decoding.constraints.errors import ConstraintError

DATA = Path(__file__).parents[5] / "shared" / "data" / "dev_schemas.jsonl"

REFUSED = {
    # uniqueItems over strings
    "JsonSchemaStore---drupal-migration", "JsonSchemaStore---chisel-slices", "JsonSchemaStore---drupal-services",
    # formats that nobody defines: expose, timestamp, country-code
    "Github_hard---o83840", "Github_hard---o80249", "Github_trivial---o72209", "Github_medium---o76906",
    # fifty words in five hundred characters
    "Github_medium---o21142",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    if not DATA.exists():
        pytest.skip("the schemas are not here")
    return [json.loads(line) for line in DATA.read_text().splitlines()]


def _property_lists(schema: Any) -> Iterator[list[str]]:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield list(schema["properties"])
        for value in schema.values():
            yield from _property_lists(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _property_lists(value)


def _in_order(value: Any, lists: list[list[str]]) -> Any:
    """Members as that part of the schema lists them which knows most of them."""
    if isinstance(value, list):
        return [_in_order(item, lists) for item in value]
    if not isinstance(value, dict):
        return value
    known = max(lists, key=lambda names: (len(value.keys() & set(names)), -len(names)), default=[])
    names = [*(n for n in known if n in value), *(n for n in value if n not in known)]
    return {name: _in_order(value[name], lists) for name in names}


@pytest.mark.parametrize("remainder", range(4))
def test_judges_instances_as_the_validator_did(remainder, cases, compiled, accepts_value):
    refused, wrong = set(), []
    for case in cases[remainder::4]:
        try:
            grammar = compiled(case["schema"])
        except ConstraintError:
            refused.add(case["name"])
            continue
        lists = list(_property_lists(case["schema"]))
        for test in case["tests"]:
            try:
                accepted = accepts_value(grammar, _in_order(test["data"], lists), max_steps=300)
            except AssertionError:
                accepted = False  # in none of the first orders
            if accepted != test["valid"]:
                wrong.append((case["name"], test["valid"], test["data"]))
    assert not wrong
    assert refused <= REFUSED
