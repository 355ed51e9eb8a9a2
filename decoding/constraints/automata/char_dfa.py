"""Deterministic automata over character classes, and the operations that stay within them.

An intermediate form: rows are sparse, so neither large alphabets nor long chains cost more than their edges.
"""

from dataclasses import dataclass

from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort

_MAX_EDGES = 1_000_000
"""Of one automaton, between classes of characters: 40 MB."""


@dataclass(slots=True)
class CharDFA:
    """State 0 is the start; no states: the empty language."""

    rows: list[dict[int, int]]
    """Per state: class to next state, classes ascending."""
    accepting: list[bool]


def complement(dfa: CharDFA, num_classes: int, effort: Effort) -> CharDFA:
    """All texts that `dfa` does not accept. Minimal, if `dfa` was, but for states that accept nothing."""
    sink = len(dfa.rows)
    everything = dict.fromkeys(range(num_classes), sink)
    check_edges((len(dfa.rows) + 1) * num_classes)
    rows = []
    for row in dfa.rows:
        effort.spend(1 + num_classes // 16)
        rows.append(everything | row)
    return CharDFA([*rows, everything], [*(not accepts for accepts in dfa.accepting), True])


def intersection(parts: list[CharDFA], effort: Effort) -> CharDFA:
    """Texts that all of the parts accept, by exploring the tuples of states that are reached."""
    if any(not part.rows for part in parts):
        return CharDFA([], [])
    start = (0,) * len(parts)
    ids = {start: 0}
    order = [start]
    rows: list[dict[int, int]] = []
    num_edges = 0
    for states in order:
        part_rows = [part.rows[state] for part, state in zip(parts, states, strict=True)]
        row: dict[int, int] = {}
        for number, target in part_rows[0].items():
            targets = [target]
            for other in part_rows[1:]:
                if number not in other:
                    break
                targets.append(other[number])
            else:
                key = tuple(targets)
                if key not in ids:
                    ids[key] = len(order)
                    order.append(key)
                row[number] = ids[key]
        rows.append(row)
        num_edges += len(row)
        check_edges(num_edges)
        effort.spend(1 + len(part_rows[0]) // 4)
        check_unfinished(len(order), effort)
    accepting = [all(p.accepting[s] for p, s in zip(parts, states, strict=True)) for states in order]
    return CharDFA(rows, accepting)


def check_unfinished(num_states: int, effort: Effort) -> None:
    """An automaton in the making may have ten times as many states as a finished one."""
    if num_states > 10 * effort.limits.max_states:
        effort.check_states(num_states)


def check_edges(num_edges: int) -> None:
    if num_edges > _MAX_EDGES:
        raise ConstraintTooComplex(f"the constraint needs more than {_MAX_EDGES} automaton transitions")
