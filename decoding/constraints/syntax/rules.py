"""Rules in extended Backus-Naur form as values: what the readers of Lark and GBNF make.

Knows neither how rules are written nor what becomes of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import Expression


@dataclass(frozen=True, slots=True)
class Reference:
    name: str
    position: int
    """Where it stands in the source."""
    arguments: tuple["Item", ...] = ()
    """Of a template, which is expanded before rules become a grammar."""


@dataclass(frozen=True, slots=True)
class Group:
    options: "Body"
    low: int = 1
    high: int | None = 1


Item: TypeAlias = Expression | Reference | Group
Body: TypeAlias = tuple[tuple[Item, ...], ...]
"""Alternatives, each a sequence."""


def references(body: Body) -> Iterator[Reference]:
    """Every reference, arguments of templates included."""
    pending: list[Item] = [item for option in body for item in option]
    while pending:
        item = pending.pop()
        if isinstance(item, Reference):
            yield item
            pending.extend(item.arguments)
        elif isinstance(item, Group):
            pending.extend(inner for option in item.options for inner in option)
