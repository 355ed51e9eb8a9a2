"""Expressions to nondeterministic automata over character classes (Thompson), and those to deterministic ones.

The empty move is used only where two ends meet, so most subsets of the subset construction are single states.
Expressions with operators that need a deterministic automaton (intersection, complement, counted groups) come in
as such, from whoever calls.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.char_dfa import CharDFA, check_edges, check_unfinished
from cadenza.decoding.constraints.limits import Effort

_MAX_SUBSET_ELEMENTS = 4_000_000
"""Of all subsets together: 32 MB."""
Edge = tuple[tuple[int, ...], int]
"""The classes that lead to the next state."""


@dataclass(slots=True)
class NFA:
    effort: Effort
    edges: list[list[Edge]] = field(default_factory=list)
    empty_moves: list[list[int]] = field(default_factory=list)

    def state(self) -> int:
        self.edges.append([])
        self.empty_moves.append([])
        self.effort.spend()
        check_unfinished(len(self.edges), self.effort)
        return len(self.edges) - 1

    def connect(self, source: int, classes: tuple[int, ...], target: int) -> None:
        if classes:
            self.edges[source].append((classes, target))

    def skip(self, source: int, target: int) -> None:
        if source != target:
            self.empty_moves[source].append(target)

    def embed(self, dfa: CharDFA, start: int, end: int, *, without_empty: bool = False) -> None:
        """A copy of the automaton between two states, optionally less the empty text."""
        if not dfa.rows:
            return
        states = [self.state() for _ in dfa.rows]
        for state, row, accepts in zip(states, dfa.rows, dfa.accepting, strict=True):
            by_target: dict[int, list[int]] = {}
            for number, target in row.items():
                by_target.setdefault(target, []).append(number)
            self.edges[state] = [(tuple(numbers), states[target]) for target, numbers in by_target.items()]
            self.effort.spend(1 + len(row) // 8)
            if accepts:
                self.skip(state, end)
        if without_empty and dfa.accepting[0]:
            self.edges[start].extend(self.edges[states[0]])
        else:
            self.skip(start, states[0])

    def words(self, words: Iterable[Iterable[int]], start: int, end: int) -> None:
        """Any one of the words (of classes), with shared beginnings and endings: deterministic and minimal."""
        children: list[dict[int, int]] = [{}]
        ends: list[bool] = [False]
        for word in words:
            node = 0
            for number in word:
                following = children[node].get(number)
                if following is None:
                    following = children[node][number] = len(children)
                    children.append({})
                    ends.append(False)
                    self.effort.spend()
                node = following
            ends[node] = True
            check_unfinished(len(children), self.effort)
        if ends[0]:
            self.skip(start, end)
        states: dict[tuple[bool, tuple[tuple[int, int], ...]], int] = {(True, ()): end}
        state_of = [start] * len(children)
        for node in range(len(children) - 1, 0, -1):  # children come after their parents
            edges = tuple([(number, state_of[child]) for number, child in children[node].items()])
            key = (ends[node], edges)
            if key not in states:
                states[key] = self.state()
                self.edges[states[key]] = [((number,), target) for number, target in sorted(edges)]
                if ends[node]:
                    self.skip(states[key], end)
            state_of[node] = states[key]
        self.edges[start] += [((number,), state_of[child]) for number, child in children[0].items()]


def determinize(nfa: NFA, start: int, end: int) -> CharDFA:
    """Subset construction. States without any way on, other than the end, are left out of the subsets."""
    construction = _Subsets(nfa, end)
    construction.id_of((start,))
    rows = []
    num_edges = 0
    for subset in construction.order:
        rows.append(construction.row(subset))
        num_edges += len(rows[-1])
        check_edges(num_edges)
        nfa.effort.spend(1 + len(subset) // 4)
    return CharDFA(rows, [end in subset for subset in construction.order])


class _Subsets:
    def __init__(self, nfa: NFA, end: int) -> None:
        self._nfa = nfa
        self._end = end
        self._closures: dict[int, tuple[int, ...]] = {}
        self._ids: dict[tuple[int, ...], int] = {}
        self._num_elements = 0
        self.order: list[tuple[int, ...]] = []

    def id_of(self, states: tuple[int, ...]) -> int:
        """Of the subset that the states and their empty moves make."""
        if len(states) == 1:
            subset = self._closure(states[0])
        else:
            subset = tuple(sorted({s for state in states for s in self._closure(state)}))
        number = self._ids.get(subset)
        if number is None:
            number = self._ids[subset] = len(self.order)
            self.order.append(subset)
            self._num_elements += len(subset)
            check_unfinished(number + 1, self._nfa.effort)
            if self._num_elements > _MAX_SUBSET_ELEMENTS:
                check_unfinished(self._num_elements, self._nfa.effort)
        return number

    def row(self, subset: tuple[int, ...]) -> dict[int, int]:
        edges = [edge for state in subset for edge in self._nfa.edges[state]]
        if len(edges) == 1:
            classes, target = edges[0]
            return dict.fromkeys(classes, self.id_of((target,)))
        moves: dict[int, list[int]] = {}
        for classes, target in edges:
            for number in classes:
                if number in moves:
                    moves[number].append(target)
                else:
                    moves[number] = [target]
        self._nfa.effort.spend(1 + (len(edges) + len(moves)) // 4)
        known: dict[tuple[int, ...], int] = {}
        row = {}
        for number in sorted(moves):
            targets = tuple(moves[number])
            if targets not in known:
                known[targets] = self.id_of(targets)
            row[number] = known[targets]
        return row

    def _closure(self, state: int) -> tuple[int, ...]:
        known = self._closures.get(state)
        if known is not None:
            return known
        seen = {state}
        pending = [state]
        while pending:
            for target in self._nfa.empty_moves[pending.pop()]:
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        self._nfa.effort.spend(1 + len(seen) // 4)
        closure = tuple(sorted(s for s in seen if s == self._end or self._nfa.edges[s]))
        self._closures[state] = closure
        return closure
