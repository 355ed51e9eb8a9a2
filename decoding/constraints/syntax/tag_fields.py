"""What tags and triggers of structural tags say, read and checked. Knows nothing of grammars."""

import json
from collections.abc import Sequence
from typing import Any

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.syntax.fields import Fields


def modern(fields: Fields) -> dict[str, Any]:
    """The newer form of the older one."""
    tags = []
    for number, structure in enumerate(fields.list("structures")):
        inner = Fields(structure, f"#/structures/{number}")
        schema = inner.any("schema")
        if isinstance(schema, str):
            schema = _parsed(schema, f"#/structures/{number}/schema")
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"type": "tag", "begin": inner.any("begin"), "content": content, "end": inner.any("end")})
        inner.finish()
    format_ = {"type": "triggered_tags", "triggers": fields.list("triggers"), "tags": tags}
    fields.finish()
    return format_


def _parsed(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConstraintError(f"the schema is not JSON: {error}", path) from None


def marker(fields: Fields, name: str) -> str:
    if isinstance(fields.any(name), dict):
        raise fields.error("a token in the place of a string is not supported", name)
    return fields.text(name)


def end_strings(fields: Fields) -> list[str]:
    if not isinstance(fields.any("end"), list):
        return [marker(fields, "end")]
    ends = [
        Fields({"end": end}, f"{fields.path}/end/{number}").text("end")
        for number, end in enumerate(fields.list("end"))
    ]
    if not ends:
        raise fields.error("at least one end is needed", "end")
    return list(dict.fromkeys(ends))


def only_trigger(begin: str, triggers: Sequence[str], tag: Fields) -> str:
    found = [trigger for trigger in dict.fromkeys(triggers) if begin.startswith(trigger)]
    if len(found) != 1:
        many = "no trigger" if not found else f"more than one trigger ({', '.join(map(repr, found))})"
        raise tag.error(f"{begin!r} begins with {many}", "begin")
    return found[0]


def check_reachable(markers: Sequence[str], fields: Fields) -> None:
    """Of two markers, the one that is complete first is the one that counts."""
    for marker in markers:
        for other in markers:
            if other in marker[:-1]:
                raise fields.error(f"{marker!r} can never be reached, for {other!r} is complete before it")
