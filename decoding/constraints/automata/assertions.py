"""Anchors, word boundaries and lookarounds: from a parsed pattern to an expression without them, exactly.

A condition on what follows is an intersection with the rest of the pattern, which reaches to the end of the text. A
condition on what came before is decided by the character before: where the rest of the pattern asks for it, the part
to the left is split by its last character, into as few sets as the conditions can tell apart. Both need to see the
pattern as one sequence; inside of an unbounded repetition there is no such sequence, and the parser refuses them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import (
    ANY_TEXT,
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
class Guarded:
    """(?:(?!...)[...])* without upper bound: characters of a set, conditions on what follows before and after each."""

    chars: CharSet
    low: int
    ahead_before: tuple[Follows, ...]
    ahead_after: tuple[Follows, ...]
    position: int


@dataclass(slots=True, eq=False)
class _Compound:
    nodes: tuple["Node", ...]
    num_assertions: int = field(init=False)
    is_zero_width: bool = field(init=False)
    looks_back: bool = field(init=False)

    def __post_init__(self) -> None:
        self.num_assertions = sum(map(num_assertions, self.nodes))
        self.is_zero_width = all(map(is_zero_width, self.nodes))
        self.looks_back = any(map(looks_back, self.nodes))


class Sequence(_Compound):
    """One after the other."""

    __slots__ = ()


class Choice(_Compound):
    """Any one of them."""

    __slots__ = ()


Assertion: TypeAlias = Follows | AtEnd | Preceded | Boundary | Behind | Guarded
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
    """Whether it can only match the empty text. Of plain expressions, only the one that says so is seen to."""
    if isinstance(node, _Compound):
        return node.is_zero_width
    return node is EPSILON or not (is_plain(node) or isinstance(node, Guarded))


def num_assertions(node: Node) -> int:
    if isinstance(node, Follows):
        return 1 + num_assertions(node.node)
    return node.num_assertions if isinstance(node, _Compound) else int(not is_plain(node))


def looks_back(node: Node) -> bool:
    """Whether what it matches depends on what came before."""
    if isinstance(node, Follows):
        return looks_back(node.node)
    return node.looks_back if isinstance(node, _Compound) else isinstance(node, Preceded | Boundary | Behind)


def sequence(nodes: Iterable[Node]) -> Node:
    """Nested sequences laid flat, neighbouring literals joined; an expression if all of the nodes are."""
    flat: list[Node] = []
    letters: list[str] = []
    for node in nodes:
        for part in elements(node):
            if isinstance(part, Literal):
                letters.append(part.text)
                continue
            _append_text(flat, letters)
            _append(flat, part)
    _append_text(flat, letters)
    if len(flat) == 1:
        return flat[0]
    if all(map(is_plain, flat)):
        return Concat(tuple(flat)) if flat else EPSILON  # type: ignore[arg-type]
    return Sequence(tuple(flat))


def _append_text(flat: list[Node], letters: list[str]) -> None:
    if text := "".join(letters):
        flat.append(Literal(text))
    letters.clear()


def _append(flat: list[Node], part: Node) -> None:
    """Beside any text, of a repetition only the least number matters."""
    if part == ANY_TEXT:
        while flat and isinstance(last := flat[-1], Repeat):
            if last.min > 0:
                flat[-1] = Repeat(last.body, last.min, last.min)
                break
            flat.pop()
    elif flat and flat[-1] == ANY_TEXT and isinstance(part, Repeat):
        if part.min == 0:
            return
        part = Repeat(part.body, part.min, part.min)
    flat.append(part)


def choice(nodes: list[Node]) -> Node:
    if len(nodes) == 1:
        return nodes[0]
    if all(map(is_plain, nodes)):
        return Alternation(tuple(nodes))  # type: ignore[arg-type]
    return Choice(tuple(nodes))


def elements(node: Node) -> tuple[Node, ...]:
    """What it is a sequence of."""
    if isinstance(node, Sequence):
        return node.nodes
    return node.parts if isinstance(node, Concat) else (node,)


def guarded(node: Node, low: int, position: int) -> Guarded | None:
    """The repetition of a body that consists of lookaheads around one character, if that is what the node is."""
    parts = elements(node)
    places = [i for i, part in enumerate(parts) if isinstance(part, CharSet)]
    conditions = [part for part in parts if isinstance(part, Follows) and not looks_back(part)]
    if len(places) != 1 or len(conditions) != len(parts) - 1:
        return None
    chars = parts[places[0]]
    assert isinstance(chars, CharSet)
    before = tuple(conditions[: places[0]])
    return Guarded(chars, low, before, tuple(conditions[places[0] :]), position)
