"""Anchors, word boundaries and lookarounds: from a parsed pattern to an expression without them, exactly.

A condition on what follows is an intersection with the rest of the pattern, which reaches to the end of the text. A
condition on what came before is decided by the character before: where the rest of the pattern asks for it, the part
to the left is split by its last character, into as few sets as the conditions can tell apart. Both need to see the
pattern as one sequence; inside of an unbounded repetition there is no such sequence, and the parser refuses them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
)
from cadenza.decoding.constraints.automata.unicode_sets import shorthand

_NEWLINE = CharSet.chars("\n")


@dataclass(frozen=True, slots=True, eq=False)
class Follows:
    """(?=...) and (?!...): what follows begins, or does not begin, with what the node matches."""

    node: "Node"
    negative: bool


@dataclass(frozen=True, slots=True, eq=False)
class AtEnd:
    """Nothing follows."""


@dataclass(frozen=True, slots=True, eq=False)
class Preceded:
    """^ and (?<=...) of one character: the text before is empty, or ends in one of the set. Negative: neither."""

    chars: CharSet
    or_start: bool
    negative: bool


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """\\b and \\B, in the reading of one set of word characters."""

    words: CharSet
    negative: bool
    in_empty_text: bool
    """Whether \\B holds in the empty text: in JavaScript it does, in Python before 3.14 it does not."""


@dataclass(frozen=True, slots=True, eq=False)
class Behind:
    """(?<=...) of more than one character: only known where it ends the pattern."""

    body: Expression
    negative: bool
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    nodes: tuple["Node", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    nodes: tuple["Node", ...]


Assertion: TypeAlias = Follows | AtEnd | Preceded | Boundary | Behind
Node: TypeAlias = Expression | Assertion | Sequence | Choice
AT_START = Preceded(CharSet(()), True, False)

AT_END = AtEnd()


def boundary(negative: bool, *, wide: bool, ascii_only: bool) -> Node:
    """Of words in ASCII and words in Unicode: both readings must hold, or in the wide sense one of them."""
    readings = [Boundary(shorthand("w", wide=False), negative, wide)]
    if not ascii_only:
        readings.append(Boundary(shorthand("w", wide=True), negative, wide))
    return Choice(tuple(readings)) if wide else Sequence(tuple(readings))


def is_plain(node: Node) -> bool:
    return isinstance(node, Literal | CharSet | Concat | Alternation | Repeat | And | Not)


def is_zero_width(node: Node) -> bool:
    if isinstance(node, Sequence | Choice):
        return all(is_zero_width(part) for part in node.nodes)
    return node is EPSILON or not is_plain(node)


def sequence(nodes: Iterable[Node]) -> Node:
    """Nested sequences laid flat, neighbouring literals joined; an expression if all of the nodes are."""
    flat: list[Node] = []
    for node in nodes:
        for part in _elements(node):
            if isinstance(part, Literal) and flat and isinstance(flat[-1], Literal):
                flat[-1] = Literal(flat[-1].text + part.text)
            else:
                flat.append(part)
    flat = [node for node in flat if node != EPSILON]
    if len(flat) == 1:
        return flat[0]
    if all(map(is_plain, flat)):
        return Concat(tuple(flat)) if flat else EPSILON  # type: ignore[arg-type]
    return Sequence(tuple(flat))


def choice(nodes: list[Node]) -> Node:
    if len(nodes) == 1:
        return nodes[0]
    if all(map(is_plain, nodes)):
        return Alternation(tuple(nodes))  # type: ignore[arg-type]
    return Choice(tuple(nodes))


def _elements(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Sequence):
        return node.nodes
    return node.parts if isinstance(node, Concat) else (node,)
