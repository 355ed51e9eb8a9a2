"""Rules in extended Backus-Naur form as values: what the readers of Lark and GBNF make.

Knows neither how rules are written nor what becomes of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.errors import ConstraintTooComplex

_MAX_DIGITS = 12


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


@dataclass(frozen=True, slots=True)
class Intersection:
    """What all of the sequences match. Only inside terminals."""

    sequences: "Body"


@dataclass(frozen=True, slots=True)
class Complement:
    """What the item does not match. Only inside terminals."""

    item: "Item"


Item: TypeAlias = Expression | Reference | Group | Intersection | Complement
Body: TypeAlias = tuple[tuple[Item, ...], ...]
"""Alternatives, each a sequence."""


def items_of(body: Body) -> Iterator[Item]:
    """Every item at any depth, arguments of templates included."""
    pending: list[Item] = [item for option in body for item in option]
    while pending:
        item = pending.pop()
        yield item
        match item:
            case Reference(_, _, arguments):
                pending.extend(arguments)
            case Group(options) | Intersection(options):
                pending.extend(inner for option in options for inner in option)
            case Complement(inner):
                pending.append(inner)


def references(body: Body) -> Iterator[Reference]:
    return (item for item in items_of(body) if isinstance(item, Reference))


def count(digits: str) -> int:
    """A number of repetitions."""
    if len(digits) > _MAX_DIGITS:
        raise ConstraintTooComplex(f"a number of repetitions has more than {_MAX_DIGITS} digits")
    return int(digits)


@dataclass(slots=True)
class OpenGroup:
    """A bracket that a reader has not seen closed yet, or the whole of a rule."""

    position: int
    closing: str = ""
    options: list[tuple[Item, ...]] = field(default_factory=list)
    operands: list[tuple[Item, ...]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    may_repeat: bool = False
    """Whether an operator may follow: not at the start, and not after another."""
    is_negated: bool = False
    """Whether the next item is."""

    def add(self, item: Item) -> None:
        self.items.append(Complement(item) if self.is_negated else item)
        self.may_repeat = not self.is_negated
        self.is_negated = False

    def repeat(self, low: int, high: int | None) -> None:
        last = self.items[-1]
        once = isinstance(last, Group) and (last.low, last.high) == (1, 1)
        self.items[-1] = Group(last.options if isinstance(last, Group) and once else ((last,),), low, high)
        self.may_repeat = False

    def next_operand(self) -> None:
        self.operands.append(tuple(self.items))
        self.items = []
        self.may_repeat = False

    def next_option(self) -> None:
        if self.operands:
            self.next_operand()
            self.items, self.operands = [Intersection(tuple(self.operands))], []
        self.options.append(tuple(self.items))
        self.items = []
        self.may_repeat = False

    def body(self) -> Body:
        self.next_option()
        return tuple(self.options)
