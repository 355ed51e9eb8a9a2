"""The graph-structured stack: where a text goes on once a rule is finished.

A node is a set of frames, one for each place that waits for the rule: the position behind it, and the node of the
production around that position. Nodes are hash-consed, after Tomita's graph-structured stack (1987) and the sharing
of equal suffixes: two places in a text that are waited for alike are one node. Knows nothing of text.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from cadenza.decoding.constraints.grammar.components import components

_MAX_CANDIDATES = 8


class Node:
    """Compares by identity. Complete when it is made known, never changed after."""

    __slots__ = ("best", "cost", "frames")

    def __init__(self) -> None:
        self.frames: tuple[Frame, ...] = ()
        self.cost = 0
        """The price of the cheapest text from here to the end."""
        self.best: Frame | None = None
        """The frame by which that text goes on. Following these always ends."""


Frame: TypeAlias = tuple[int, Node]
OpenFrame: TypeAlias = tuple[int, Node | int]
"""A frame whose node may still be wanted: a rule's number stands for the node to be made for it."""


class Stack:
    """Makes nodes, and finds the ones that there are."""

    def __init__(self, cost: Sequence[int]) -> None:
        self._cost = cost
        self._nodes: dict[frozenset[Frame], Node] = {}
        self._systems: dict[frozenset[tuple[int, frozenset[OpenFrame]]], dict[int, Node]] = {}
        self.num_frames = 0
        """Looked at so far, a measure of work."""

    def node(self, frames: Sequence[Frame]) -> Node:
        self.num_frames += 1 + len(frames)
        key = frozenset(frames)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node()
            self._fill([node], [frames])
        return node

    def nodes(self, wanted: Iterable[int], calls: Mapping[int, Mapping[OpenFrame, None]]) -> dict[int, Node]:
        """The node of each wanted rule, whose frames are its calls."""
        made: dict[int, Node] = {}
        for group in components(wanted, lambda rule: (r for _, r in calls[rule] if isinstance(r, int))):
            frames = {rule: _settled(calls[rule], made) for rule in group}
            if any(isinstance(node, int) for _, node in frames[group[0]]):
                made.update(self._cycle(frames))
            else:
                made[group[0]] = self.node(_substituted(frames[group[0]], made))
        return made

    def _cycle(self, calls: Mapping[int, Sequence[OpenFrame]]) -> dict[int, Node]:
        """The nodes of rules that begin with each other, or with themselves."""
        self.num_frames += 2 * sum(map(len, calls.values()))
        key = frozenset((rule, frozenset(frames)) for rule, frames in calls.items())
        known = self._systems.get(key)
        if known is None:
            known = self._systems[key] = self._alike(calls) or self._new_cycle(calls)
        return known

    def _new_cycle(self, calls: Mapping[int, Sequence[OpenFrame]]) -> dict[int, Node]:
        made = {rule: Node() for rule in calls}
        frames = [_substituted(calls[rule], made) for rule in made]
        self._fill(list(made.values()), frames)
        for node in made.values():
            self._nodes.setdefault(frozenset(node.frames), node)
        return made

    def _alike(self, calls: Mapping[int, Sequence[OpenFrame]]) -> dict[int, Node] | None:
        """Older nodes that behave the same, if there are: the proof is coinductive (a bisimulation).

        `e: e "+" e | ...` asks for a new node behind each "+", waited for by the older one and by itself; taking
        it to be the older one makes their frames equal, so they are equal. Ambiguity then costs nothing.
        """
        candidates: dict[int, list[Node]] = {rule: [] for rule in calls}
        for frames in calls.values():
            older: dict[int, list[Node]] = {}
            for position, node in frames:
                if isinstance(node, Node):
                    older.setdefault(position, []).append(node)
            for position, rule in frames:
                if isinstance(rule, int):
                    candidates[rule].extend(older.get(position, ())[:_MAX_CANDIDATES])
        for attempt in range(_MAX_CANDIDATES if len(calls) == 1 else 1):
            if any(len(nodes) <= attempt for nodes in candidates.values()):
                return None
            self.num_frames += sum(map(len, calls.values()))
            guess = {rule: nodes[attempt] for rule, nodes in candidates.items()}
            if all(
                frozenset(_substituted(frames, guess)) == frozenset(guess[rule].frames)
                for rule, frames in calls.items()
            ):
                return guess
        return None

    def _fill(self, nodes: Sequence[Node], frames: Sequence[Sequence[Frame]]) -> None:
        """Give new nodes their frames and prices. The nodes may refer to each other."""
        unknown = {id(node) for node in nodes}
        for node, its_frames in zip(nodes, frames, strict=True):
            node.frames = tuple(dict.fromkeys(its_frames))
            changed = True
        while changed:
            changed = False
            for node in nodes:
                for frame in node.frames:
                    position, behind = frame
                    if id(behind) in unknown:
                        continue
                    cost = self._cost[position] + behind.cost
                    if id(node) in unknown or cost < node.cost:
                        node.cost, node.best, changed = cost, frame, True
                        unknown.discard(id(node))


def _settled(frames: Iterable[OpenFrame], made: Mapping[int, Node]) -> list[OpenFrame]:
    return [(p, made.get(node, node) if isinstance(node, int) else node) for p, node in frames]


def _substituted(frames: Iterable[OpenFrame], made: Mapping[int, Node]) -> list[Frame]:
    return [(p, made[node] if isinstance(node, int) else node) for p, node in frames]
