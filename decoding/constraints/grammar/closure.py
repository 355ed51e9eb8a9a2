"""What may begin behind a text, before any of its bytes is seen: Earley's predictor and completer in one step.

From the positions that a text has just reached (the kernel) to the terminals that may follow, through rules that
begin, rules that end and rules that are empty (Aycock & Horspool 2002). A call at the end of a production waits for
nothing of its own, so it takes over the frames of the rule around it, as Leo (1991) does for right recursion: a list
of any length is as deep as one of its items. Closures depend on the kernel alone and are remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.positions import ACCEPT, END, START, CompiledGrammar
from cadenza.decoding.constraints.grammar.stack import Frame, Node, OpenFrame, Stack

Thread: TypeAlias = tuple[int, int, int, Node]
"""A terminal being read: its number, the state of its automaton, the position behind it, the node behind that."""

_MAX_ITEMS = 20_000
_FRAMES_PER_ITEM = 8


@dataclass(frozen=True, slots=True)
class Closure:
    threads: tuple[Thread, ...]
    is_complete: bool
    """The text may end here."""


class Closer:
    """Closures of one grammar, and the nodes that they are made of. Grows with the texts that are read."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._max_items = _MAX_ITEMS + 2 * len(grammar.symbol)  # a long list of alternatives is not ambiguous
        self._known: dict[Frame | frozenset[Frame], Closure] = {}
        self.stack = Stack(grammar.cost)
        self._num_items = 0
        self._num_frames = 0

    @property
    def num_items(self) -> int:
        """Looked at so far, the measure of work. Frames are copied in bulk and weigh less."""
        return self._num_items + (self._num_frames + self.stack.num_frames) // _FRAMES_PER_ITEM

    def start(self) -> Closure:
        end = self.stack.node(())
        return self.close([(START, self.stack.node([(ACCEPT, end)]))])

    def close(self, kernel: Sequence[Frame]) -> Closure:
        key = kernel[0] if len(kernel) == 1 else frozenset(kernel)
        closure = self._known.get(key)
        if closure is None:
            closure = self._known[key] = self._close(kernel)
        return closure

    def _close(self, kernel: Sequence[Frame]) -> Closure:
        grammar = self._grammar
        symbol, after, may_skip = grammar.symbol, grammar.after, grammar.may_skip
        threads: dict[Thread, None] = {}
        calls: dict[int, dict[OpenFrame, None]] = {}
        items = dict.fromkeys(kernel)
        pending = list(items)
        is_complete = False
        for position, node in pending:  # grows while it is walked
            following: Sequence[Frame] = ()
            if position == END:
                following = node.frames
            elif position == ACCEPT:
                is_complete = True
            else:
                behind = (after[position], node)
                if symbol[position] >= 0:
                    threads[symbol[position], 0, *behind] = None
                elif behind[0] == END:
                    self._num_frames += len(node.frames)
                    calls.setdefault(~symbol[position], {}).update(dict.fromkeys(node.frames))
                else:
                    calls.setdefault(~symbol[position], {})[behind] = None
                if may_skip[position]:
                    following = (behind,)
            for frame in following:
                if frame not in items:
                    items[frame] = None
                    pending.append(frame)
            self._check(len(pending))
        self._num_items += len(pending)
        if calls:
            threads.update(dict.fromkeys(self._begun(calls)))
        return Closure(tuple(threads), is_complete)

    def _begun(self, calls: dict[int, dict[OpenFrame, None]]) -> list[Thread]:
        """The terminals with which the called rules begin. Adds the calls that these rules begin with."""
        grammar = self._grammar
        begun: list[tuple[int, int, int]] = []
        heirs: dict[int, list[int]] = {}
        order = list(calls)
        for rule in order:  # grows while it is walked
            for position in grammar.openings[rule]:
                symbol, after = grammar.symbol[position], grammar.after[position]
                if symbol >= 0:
                    begun.append((symbol, after, rule))
                    continue
                if ~symbol not in calls:
                    calls[~symbol] = {}
                    order.append(~symbol)
                if after != END:
                    calls[~symbol][after, rule] = None
                elif ~symbol != rule:
                    heirs.setdefault(rule, []).append(~symbol)
        self._num_items += len(begun) + len(order)
        self._inherit(calls, heirs)
        nodes = self.stack.nodes(dict.fromkeys(rule for _, _, rule in begun), calls)
        return [(terminal, 0, after, nodes[rule]) for terminal, after, rule in begun]

    def _inherit(self, calls: dict[int, dict[OpenFrame, None]], heirs: dict[int, list[int]]) -> None:
        pending = dict.fromkeys(heirs)
        num_frames = 0
        while pending:
            rule, _ = pending.popitem()
            for heir in heirs.get(rule, ()):
                before = len(calls[heir])
                calls[heir].update(calls[rule])
                if len(calls[heir]) > before:
                    num_frames += len(calls[heir]) - before
                    self._check(num_frames)
                    pending[heir] = None
        self._num_frames += num_frames

    def _check(self, num_items: int) -> None:
        if num_items > self._max_items:
            raise MatcherError(
                f"the constraint is too ambiguous: more than {self._max_items} readings at once"
            )
