"""The smallest automaton of the same language: states that lead nowhere removed, equal ones merged.

Partition refinement by signatures (Moore), with Hopcroft's rule that of a block that splits, the largest piece
keeps its number: a state is looked at again only when a successor changed its number, O(edges · log states) in all.
"""

from operator import itemgetter
from typing import Any

from cadenza.decoding.constraints.automata.char_dfa import CharDFA
from cadenza.decoding.constraints.limits import Effort


def minimize(dfa: CharDFA, effort: Effort) -> CharDFA:
    trimmed = _trim(dfa, effort)
    return _merge(trimmed, _refine(trimmed, effort)) if trimmed.rows else trimmed


def _predecessors(rows: list[dict[int, int]], effort: Effort) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in rows]
    for state, row in enumerate(rows):
        effort.spend(1 + len(row) // 8)
        for target in set(row.values()):
            before[target].append(state)
    return before


def _trim(dfa: CharDFA, effort: Effort) -> CharDFA:
    """Without the states from which nothing is accepted. All states are reachable by construction."""
    before = _predecessors(dfa.rows, effort)
    alive = list(dfa.accepting)
    pending = [state for state, accepts in enumerate(alive) if accepts]
    while pending:
        effort.spend()
        for state in before[pending.pop()]:
            if not alive[state]:
                alive[state] = True
                pending.append(state)
    if all(alive):
        return dfa
    if not alive[0]:
        return CharDFA([], [])
    kept = [state for state, lives in enumerate(alive) if lives]
    number = {state: i for i, state in enumerate(kept)}
    rows = [{c: number[t] for c, t in dfa.rows[state].items() if t in number} for state in kept]
    return CharDFA(rows, [dfa.accepting[state] for state in kept])


def _refine(dfa: CharDFA, effort: Effort) -> list[int]:
    """The number of each state's block: equal for states of equal languages."""
    before = _predecessors(dfa.rows, effort)
    block, members = _first_blocks(dfa)
    signature_of = [_signature(row) for row in dfa.rows]
    dirty: set[int] | range = range(len(block))
    while dirty:
        effort.spend(1 + len(dirty) // 2)
        pieces: dict[int, dict[Any, list[int]]] = {}
        for state in dirty:
            get = signature_of[state]
            signature = get(block) if get else None
            pieces.setdefault(block[state], {}).setdefault(signature, []).append(state)
        changed: list[int] = []
        for number, by_signature in pieces.items():
            for piece in _split_off(members[number], list(by_signature.values())):
                members[number].difference_update(piece)
                for state in piece:
                    block[state] = len(members)
                members.append(set(piece))
                changed += piece
        dirty = {state for target in changed for state in before[target]}
    return block


def _split_off(block: set[int], pieces: list[list[int]]) -> list[list[int]]:
    """All parts of the block but the largest. Members outside of all pieces are a part, too: their successors
    kept their numbers, while those of every piece include a number that is new."""
    rest = len(block) - sum(map(len, pieces))
    largest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
    if rest >= len(pieces[largest]):
        return pieces
    keeper = pieces.pop(largest)
    if rest:
        pieces.append(list(block.difference(keeper, *pieces)))
    return pieces


def _first_blocks(dfa: CharDFA) -> tuple[list[int], list[set[int]]]:
    numbers: dict[tuple[bool, tuple[int, ...]], int] = {}
    keys = [(accepts, tuple(row)) for accepts, row in zip(dfa.accepting, dfa.rows, strict=True)]
    block = [numbers.setdefault(key, len(numbers)) for key in keys]
    members: list[set[int]] = [set() for _ in numbers]
    for state, number in enumerate(block):
        members[number].add(state)
    return block, members


def _signature(row: dict[int, int]) -> Any:
    """Applied to the list of blocks: the blocks of the row's targets. None for a row without any."""
    return itemgetter(*row.values()) if row else None


def _merge(dfa: CharDFA, block: list[int]) -> CharDFA:
    """One state per block, numbered in the order in which a breadth-first search meets them."""
    number = {block[0]: 0}
    order = [0]
    rows = []
    for state in order:
        row = {}
        for char_class, target in dfa.rows[state].items():
            place = number.get(block[target])
            if place is None:
                place = number[block[target]] = len(order)
                order.append(target)
            row[char_class] = place
        rows.append(row)
    return CharDFA(rows, [dfa.accepting[state] for state in order])
