"""A schema document: its parts by place, its references, its draft. Knows no keyword but those that name places."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.formula import FALSE, TRUE, Formula

_DATA = frozenset({"enum", "const", "default", "examples", "example"})
_DRAFTS = {
    "draft-03": 3, "draft-04": 4, "draft-05": 4, "draft-06": 6, "draft-07": 7, "draft/2019-09": 2019,
    "draft/2020-12": 2020,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A subschema and where it stands; or, without schema, a conjunction that was given a number."""

    schema: Any
    where: str
    """A JSON pointer, `#` for the whole."""
    base: str
    """The address that references in it are relative to."""
    formula: Formula | None = None


@dataclass(slots=True)
class Document:
    root: Any
    effort: Effort
    draft: int = 2020
    nodes: list[Node] = field(default_factory=list)
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    _formulas: dict[Formula, int] = field(default_factory=dict)
    _resources: dict[str, str] = field(default_factory=dict)
    """Addresses, with fragments for anchors, to JSON pointers."""

    def __post_init__(self) -> None:
        check_json(self.root, self.effort)
        self.draft = _draft(self.root)
        self.nodes.append(Node(False, "#", ""))
        self._find_resources()

    def start(self) -> Formula:
        return self.formula(self.root, "#", self._base_of("#"))

    def formula(self, schema: Any, where: str, base: str) -> Formula:
        """The schema as a formula. Equal small schemas get one number, references the one of their target."""
        for _ in range(100):
            if schema is True or schema == {}:
                return TRUE
            if schema is False:
                return FALSE
            if not isinstance(schema, dict):
                raise ConstraintError("a schema must be an object or a boolean", where)
            if set(schema) != {"$ref"}:
                return frozenset({(self._number(schema, where, base), True)})
            schema, where, base = self.resolve(schema["$ref"], where, base)
        raise ConstraintError("$ref leads back to itself", where)

    def child(self, node: Node, *path: str | int, schema: Any) -> Formula:
        where = node.where + "".join("/" + _escaped(str(step)) for step in path)
        base = node.base
        if isinstance(schema, dict) and (name := self._own_address(schema, base)):
            base = name
        return self.formula(schema, where, base)

    def single(self, formula: Formula) -> Formula:
        """A formula of at most one schema that says the same."""
        if len(formula) <= 1:
            return formula
        if formula not in self._formulas:
            where = self.nodes[min(formula)[0]].where
            self._formulas[formula] = len(self.nodes)
            self.nodes.append(Node(None, where, "", formula))
        return frozenset({(self._formulas[formula], True)})

    def _number(self, schema: dict[str, Any], where: str, base: str) -> int:
        self.effort.spend()
        small = len(schema) <= 8 and not any(isinstance(value, dict | list) for value in schema.values())
        key = ("", json.dumps(schema)) if small else (base, where)
        if key not in self._numbers:
            self._numbers[key] = len(self.nodes)
            self.nodes.append(Node(schema, where, base))
        return self._numbers[key]

    def resolve(self, reference: Any, where: str, base: str) -> tuple[Any, str, str]:
        """The schema that a reference in `where` names, its place and its base."""
        self.effort.spend()
        if not isinstance(reference, str):
            raise ConstraintError("$ref must be a string", f"{where}/$ref")
        address = urljoin(base, reference)
        if address in self._resources:
            target = self._resources[address]
        else:
            document, fragment = urldefrag(address)
            if document not in self._resources:
                raise ConstraintError(f"$ref {reference!r} leads out of the schema", f"{where}/$ref")
            if fragment and not fragment.startswith("/"):
                raise ConstraintError(f"$ref {reference!r} names no part of the schema", f"{where}/$ref")
            target = self._resources[document] + unquote(fragment)
        schema = self._at(target, reference, where)
        return schema, target, self._base_of(target)

    def _at(self, pointer: str, reference: str, where: str) -> Any:
        value = self.root
        for step in _steps(pointer):
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise ConstraintError(f"$ref {reference!r} names no part of the schema", f"{where}/$ref")
        return value

    def _base_of(self, pointer: str) -> str:
        value, base = self.root, self._own_address(self.root, "") or ""
        for step in _steps(pointer):
            value = value[int(step)] if isinstance(value, list) else value[step]
            if isinstance(value, dict):
                base = self._own_address(value, base) or base
        return base

    def _own_address(self, schema: Any, base: str) -> str | None:
        """The address a schema gives itself, without an empty fragment. A mere fragment names no resource."""
        name = schema.get("id" if self.draft <= 4 else "$id") if isinstance(schema, dict) else None
        if not isinstance(name, str) or name.startswith("#") or (self.draft <= 7 and "$ref" in schema):
            return None
        return urldefrag(urljoin(base, name))[0] or None

    def _find_resources(self) -> None:
        self._resources[self._own_address(self.root, "") or ""] = "#"
        self._resources.setdefault("", "#")
        for schema, pointer, base in self._schemas():
            if address := self._own_address(schema, base):
                self._resources.setdefault(address, pointer)
                base = address
            for name in self._anchors(schema):
                self._resources.setdefault(f"{base}#{name}", pointer)

    def _anchors(self, schema: dict[str, Any]) -> Iterator[str]:
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                yield schema[keyword]
        for keyword in ("$id", "id"):
            name = schema.get(keyword)
            if isinstance(name, str) and name.startswith("#") and not name.startswith("#/"):
                yield name[1:]

    def _schemas(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Everything that may be a schema, with its place and the base around it."""
        stack: list[tuple[Any, str, str, bool]] = [(self.root, "#", "", False)]
        while stack:
            value, pointer, base, names = stack.pop()
            self.effort.spend()
            if isinstance(value, list):
                stack.extend((item, f"{pointer}/{i}", base, False) for i, item in enumerate(value))
            if not isinstance(value, dict):
                continue
            if not names:
                yield value, pointer, base
                base = self._own_address(value, base) or base
            for key, item in value.items():
                if isinstance(item, dict | list) and (names or key not in _DATA):
                    maps = not names and key in ("properties", "patternProperties", "dependentSchemas")
                    maps = maps or (not names and key in ("$defs", "definitions", "dependencies"))
                    stack.append((item, f"{pointer}/{_escaped(key)}", base, maps))


def check_json(value: Any, effort: Effort) -> None:
    """Refuse what no JSON text can say, before anything recurses into it."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        effort.spend()
        effort.check_nesting(depth)
        if isinstance(item, dict):
            stack.extend((key, depth + 1) for key in item)
            stack.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            stack.extend((inner, depth + 1) for inner in item)
        elif isinstance(item, str):
            if any("\ud800" <= c <= "\udfff" for c in item):
                raise ConstraintError("the schema contains half of a surrogate pair")
        elif isinstance(item, float):
            if item != item or item in (float("inf"), float("-inf")):
                raise ConstraintError(f"the schema contains {item}, which is not JSON")
        elif item is not None and not isinstance(item, int):
            raise ConstraintError(f"the schema contains a {type(item).__name__}, which is not JSON")


def _draft(root: Any) -> int:
    name = root.get("$schema") if isinstance(root, dict) else None
    if name is None:
        return 2020
    if not isinstance(name, str):
        raise ConstraintError("$schema must be a string", "#/$schema")
    number = next((n for part, n in _DRAFTS.items() if f"json-schema.org/{part}/schema" in name), 2020)
    if number == 3:
        raise ConstraintError("JSON Schema draft 3 is not supported", "#/$schema")
    return number


def _escaped(step: str) -> str:
    return step.replace("~", "~0").replace("/", "~1")


def _steps(pointer: str) -> list[str]:
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
