"""Cuts a terminal into lexemes: rules over pieces that match exactly what the terminal does.

A piece ends where the terminal ends and before each of the bytes given, so that a greedy lexer cannot run past the
places where something else may begin. The rules are left-linear over the states of the terminal's automaton, which
costs an Earley parser the same work at every character where right-linear ones cost it more and more;
pieces become expressions again by elimination of states (Brzozowski and McCluskey; equations by Arden's rule).
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    CharSet,
    Expression,
    Literal,
    concat,
    either,
    star,
)
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_automata import members_of, trimmed
from cadenza.decoding.constraints.llguidance_characters import ALL_BYTES, Characters, Edges
from cadenza.decoding.constraints.llguidance_symbols import Code, Symbols, Terminal

Exit: TypeAlias = tuple[bool, tuple[tuple[int, CharSet], ...]]
"""What may come after a piece: whether the terminal may end, and the edges into the next piece."""

_MAX_ELIMINATED = 48
"""States of an automaton that is cut into longer pieces than characters."""


def cut_terminal(symbols: Symbols, terminal: Terminal, places: dict[int, int]) -> Code:
    """places: by state, or offset in a literal, the mask of the bytes before which a piece ends there.

    Answers the rule that stands for the terminal from now on.
    """
    if terminal.dfa is None:
        return _cut_literal(symbols, terminal.text, places)
    characters = Characters(terminal.dfa, symbols.effort)
    if len(characters.states) <= _MAX_ELIMINATED:
        pieces = _Pieces(characters, places, symbols)
        if pieces.are_few:
            return pieces.rules()
    return _cut_everywhere(symbols, characters)


def _cut_everywhere(symbols: Symbols, characters: Characters) -> Code:
    """Every character a lexeme. A rule for each state of the automaton: the texts that lead to it."""
    rules = {state: symbols.add_rule() for state in characters.states}
    for state, rule in rules.items():
        for target, chars in characters.edges(state, ALL_BYTES).items():
            symbols.effort.spend()
            code = symbols.symbol(chars)
            assert code is not None
            symbols.rules[~rules[target]].append((rule, code))
            if state == 0:
                symbols.rules[~rules[target]].append((code,))
    return symbols.add_rule([(rule,) for state, rule in rules.items() if characters.dfa.accepting[state]])


def _cut_literal(symbols: Symbols, text: bytes, places: Iterable[int]) -> Code:
    parts = [text[low:high].decode() for low, high in pairwise([0, *sorted(places), len(text)])]
    codes = [symbols.symbol(Literal(part)) for part in parts]
    return symbols.add_rule([tuple(code for code in codes if code is not None)])


class _Pieces:
    def __init__(self, characters: Characters, places: dict[int, int], symbols: Symbols) -> None:
        self._characters = characters
        self._symbols = symbols
        self._places = places
        self._inside = {s: characters.edges(s, ~places.get(s, 0) & ALL_BYTES) for s in characters.states}
        self._exits: dict[Exit, list[int]] = {}
        """States after which the same may come."""
        for state in characters.states:
            edges = characters.edges(state, places[state]) if state in places else {}
            key = (bool(characters.dfa.accepting[state]), tuple(sorted(edges.items(), key=lambda e: e[0])))
            if key[0] or key[1]:
                self._exits.setdefault(key, []).append(state)

    @property
    def are_few(self) -> bool:
        """Fewer than the lexemes of single characters would be, more or less."""
        return len(self._exits) ** 2 <= 4 * len(self._characters.states) + 16

    def rules(self) -> Code:
        """For each kind of exit a rule, the texts that lead to it; those of an end are the terminal's."""
        table, effort = self._table(), self._symbols.effort
        rules = {key: self._symbols.add_rule() for key in self._exits}
        for key, states in self._exits.items():
            ends = _Ends(self._inside, table, states, effort)
            sequences = self._symbols.rules[~rules[key]]
            sequences += [(piece,) for piece in self._pieces(ends, 0, ALL_BYTES)]
            for before, rule in rules.items():
                if before[1]:
                    state = self._exits[before][0]
                    sequences += [(rule, piece) for piece in self._pieces(ends, state, self._places[state])]
        return self._symbols.add_rule([(rule,) for key, rule in rules.items() if key[0]])

    def _pieces(self, ends: "_Ends", state: int, mask: int) -> Iterator[Code]:
        """The one, if any, that begins at the state with a byte of the mask."""
        piece = ends.piece(self._characters.edges(state, mask))
        if piece is not None:
            yield self._symbols.add_piece(piece, ends.automaton(self._row(state, mask)))

    def _row(self, state: int, mask: int) -> NDArray[np.int32]:
        dfa = self._characters.dfa
        row: NDArray[np.int32] = dfa.table[state, dfa.byte_class]
        row[members_of(~mask & ALL_BYTES)] = -1
        return row

    def _table(self) -> NDArray[np.int32]:
        """[state, byte] the terminal's without the edges from one piece into the next."""
        dfa = self._characters.dfa
        table: NDArray[np.int32] = dfa.table[:, dfa.byte_class]
        for state, mask in self._places.items():
            table[state, members_of(mask)] = -1
        return table


class _Ends:
    """The pieces that end at some of the states."""

    def __init__(
        self, inside: dict[int, Edges], table: NDArray[np.int32], ends: list[int], effort: Effort
    ) -> None:
        self._paths = _paths(inside, set(ends), effort)
        self._table = table
        self._accepting = np.zeros(len(table), np.bool_)
        self._accepting[ends] = True
        self._effort = effort

    def piece(self, edges: Edges) -> Expression | None:
        parts = [_sequence(chars, self._paths[s]) for s, chars in edges.items() if s in self._paths]
        return _sum(parts) if parts else None

    def automaton(self, start: NDArray[np.int32]) -> DFA:
        """start: the row of the piece's own first state."""
        self._effort.spend(4 + len(self._table) // 8)
        table = np.vstack([start, self._table])
        table[table >= 0] += 1
        return trimmed(table, np.append(False, self._accepting))


def _paths(inside: dict[int, Edges], ends: set[int], effort: Effort) -> dict[int, Expression]:
    """By state, the texts that lead from it to one of the ends.

    One equation for each state, solved for one after the other: X = loop X | rest means X = loop* rest.
    """
    useful = _reaching(inside, ends)
    rows: dict[int, dict[int, Expression]] = {
        s: {t: chars for t, chars in inside[s].items() if t in useful} for s in useful
    }
    ending: dict[int, Expression] = dict.fromkeys(ends, EPSILON)
    solved: list[int] = []
    while len(solved) < len(rows):
        effort.spend(len(rows))
        state = min(useful, key=lambda s: _fill_in(rows, useful, s))
        useful.discard(state)
        solved.append(state)
        _eliminate(rows, ending, useful, state)
    paths: dict[int, Expression] = {}
    for state in reversed(solved):
        parts = [_sequence(chars, paths[t]) for t, chars in rows[state].items()]
        paths[state] = _sum([*([ending[state]] if state in ending else []), *parts])
    return paths


def _reaching(inside: dict[int, Edges], ends: set[int]) -> set[int]:
    before: dict[int, list[int]] = {}
    for state, edges in inside.items():
        for target in edges:
            before.setdefault(target, []).append(state)
    found, pending = set(ends), list(ends)
    while pending:
        for state in before.get(pending.pop(), []):
            if state not in found:
                found.add(state)
                pending.append(state)
    return found


def _fill_in(rows: dict[int, dict[int, Expression]], left: set[int], state: int) -> tuple[int, int]:
    """How many products it takes to do without the state; the smallest number among equals."""
    users = sum(1 for other in left if other != state and state in rows[other])
    return users * len(rows[state]), state


def _eliminate(
    rows: dict[int, dict[int, Expression]], ending: dict[int, Expression], left: set[int], state: int
) -> None:
    row = rows[state]
    loop = row.pop(state, None)
    if loop is not None:
        row.update({target: _sequence(star(loop), part) for target, part in row.items()})
        if state in ending:
            ending[state] = _sequence(star(loop), ending[state])
    for user in left:
        way = rows[user].pop(state, None)
        if way is None:
            continue
        for target, part in row.items():
            through = _sequence(way, part)
            rows[user][target] = _sum([rows[user][target], through]) if target in rows[user] else through
        if state in ending:
            through = _sequence(way, ending[state])
            ending[user] = _sum([ending[user], through]) if user in ending else through


def _sequence(first: Expression, second: Expression) -> Expression:
    if second is EPSILON:
        return first
    return second if first is EPSILON else concat(first, second)


def _sum(parts: list[Expression]) -> Expression:
    """Their union. Compares objects, not structures, which share parts and may be deep."""
    sets = [part for part in parts if isinstance(part, CharSet)]
    others: list[Expression] = [part for part in parts if not isinstance(part, CharSet)]
    if sets:
        others.insert(0, CharSet.of(r for chars in sets for r in chars.ranges))
    return either(*{id(part): part for part in others}.values())
