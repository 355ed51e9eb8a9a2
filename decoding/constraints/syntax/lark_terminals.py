"""The terminals of a Lark grammar to expressions: each stands for what the ones it names stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    And,
    Concat,
    Expression,
    Not,
    Repeat,
    concat,
    either,
)
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.fragments import measured
from cadenza.decoding.constraints.syntax.lark_reader import LarkGrammar
from cadenza.decoding.constraints.syntax.rules import (
    Body,
    Complement,
    Group,
    Intersection,
    Item,
    Reference,
    items_of,
    references,
)

_MAX_SIZE = 100_000


def terminal_expressions(
    grammar: LarkGrammar, effort: Effort
) -> tuple[dict[str, Expression], list[Expression]]:
    """Every terminal, and the ones to ignore. Raises ConstraintError where they are circular."""
    terminals = _Terminals(grammar, effort)
    for name in _in_order(grammar, effort):
        terminals.define(name, grammar.terminals[name])
    ignored = [terminals.expression("%ignore", body) for body in grammar.ignored]
    return terminals.known, ignored


def _in_order(grammar: LarkGrammar, effort: Effort) -> list[str]:
    """Names such that each comes after all that it refers to."""
    needs: dict[str, set[str]] = {}
    users: dict[str, list[str]] = {}
    for name, body in grammar.terminals.items():
        needs[name] = {reference.name for reference in references(body)}
        effort.spend(1 + len(needs[name]))
        for other in needs[name]:
            users.setdefault(other, []).append(name)
    order = [name for name, needed in needs.items() if not needed]
    for name in order:  # grows meanwhile
        effort.spend()
        for user in users.get(name, ()):
            needs[user].discard(name)
            if not needs[user]:
                order.append(user)
    circular = next((name for name, needed in needs.items() if needed), None)
    if circular is not None:
        position = next(references(grammar.terminals[circular])).position
        raise grammar.source.error(f"terminal {circular!r} is recursive; only rules may be", position)
    return order


@dataclass(slots=True)
class _Terminals:
    grammar: LarkGrammar
    effort: Effort
    known: dict[str, Expression] = field(default_factory=dict)
    _narrowed: set[str] = field(default_factory=set)
    """Terminals that contain an expression of which no complement may be taken."""

    def define(self, name: str, body: Body) -> None:
        self.known[name] = self.expression(name, body)
        if any(self._is_narrowed(item) for item in items_of(body)):
            self._narrowed.add(name)

    def expression(self, name: str, body: Body) -> Expression:
        expression = self._options(body, 1)
        fragment = measured(expression, self.effort)
        if fragment.size > _MAX_SIZE:
            raise ConstraintTooComplex(f"terminal {name!r} is longer than {_MAX_SIZE} characters")
        self.effort.check_nesting(fragment.depth)
        return expression

    def _options(self, body: Body, depth: int) -> Expression:
        self.effort.check_nesting(
            2 * depth
        )  # a bracket is two levels of an expression, and four of our calls
        return either(*[self._sequence(items, depth) for items in body])

    def _sequence(self, items: Sequence[Item], depth: int) -> Expression:
        parts: list[Expression] = []
        for item in items:
            self.effort.spend()
            part = self._item(item, depth)
            parts.extend(part.parts if isinstance(part, Concat) else [part])
        return concat(*parts) if parts else EPSILON

    def _item(self, item: Item, depth: int) -> Expression:
        match item:
            case Reference(name):
                return self.known[name]
            case Group(options, low, high):
                body = self._options(options, depth + 1)
                return body if (low, high) == (1, 1) else Repeat(body, low, high)
            case Intersection(sequences):
                return And(tuple([self._sequence(items, depth + 1) for items in sequences]))
            case Complement(inner):
                self._check_complement(inner)
                return Not(self._item(inner, depth + 1))
            case _:
                return item

    def _check_complement(self, item: Item) -> None:
        for inner in items_of(((item,),)):
            if self._is_narrowed(inner):
                raise self.grammar.source.error(
                    "the complement of \\d, \\w, \\s or of letters of either case is not supported, for they are "
                    "narrower here than Python's; write the characters out",
                    _position(item),
                )

    def _is_narrowed(self, item: Item) -> bool:
        if isinstance(item, Reference):
            return item.name in self._narrowed
        return (
            not isinstance(item, Group | Intersection | Complement) and item in self.grammar.literals.narrowed
        )


def _position(item: Item) -> int:
    return item.position if isinstance(item, Reference) else 0
