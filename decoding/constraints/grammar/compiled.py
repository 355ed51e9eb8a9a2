"""A grammar as the parser runs it: terminals as automata, the rules as linked positions with their prices.

Made once per constraint, where constraints are compiled; picklable. Knows nothing of any text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.analysis import (
    Symbols,
    cheapest_derivations,
    deriving_something,
    reachable,
)
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.grammar.numbering import Numbering
from cadenza.decoding.constraints.grammar.terminal import BYTE, Terminal
from cadenza.decoding.constraints.limits import Effort

END, ACCEPT, START = 0, 1, 2
"""The position at the end of every production, the one behind the whole text, and the one before it."""

_MAX_SHORTEST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """Positions are numbers: `symbol[p]` comes next, `after[p]` is the position behind it. Productions with a common
    rest share it. Symbol s >= 0 is terminal s, symbol s < 0 is rule ~s; every rule derives some text.
    """

    terminals: tuple[Terminal, ...]
    symbol: tuple[int, ...]
    after: tuple[int, ...]
    cost: tuple[int, ...]
    """[num_positions] the price of the cheapest text for the rest of the production."""
    may_skip: tuple[bool, ...]
    """[num_positions] whether `symbol[p]` derives the empty text."""
    openings: tuple[tuple[int, ...], ...]
    """[num_rules] the positions at which a text of the rule that is not empty may begin."""
    best: tuple[int, ...]
    """[num_rules] the position that begins a cheapest production. Following these always ends."""

    @property
    def min_bytes(self) -> int:
        return self.cost[START] // BYTE


def compile_grammar(grammar: Grammar, effort: Effort) -> CompiledGrammar:
    """Raises ConstraintError where a rule is not defined or the grammar derives nothing."""
    numbering = Numbering(effort)
    rules = numbering.rules_of(grammar)
    terminals = numbering.terminals
    prices = [None if terminal is None else terminal.cost[0] for terminal in terminals]
    cheapest = cheapest_derivations(rules, prices, effort)
    if cheapest.price[0] is None:
        raise ConstraintError("no text satisfies the constraint")
    live = [
        [p for p in productions if all((prices[s] if s >= 0 else cheapest.price[~s]) is not None for s in p)]
        for productions in rules
    ]
    kept = reachable(live, 0, effort)
    layout = _Layout(terminals, {rule: number for number, rule in enumerate(kept)}, effort)
    layout.silent = _silent(live, terminals, effort)
    layout.rule_prices = [_affordable(cheapest.price[rule]) for rule in kept]
    layout.add_start()
    heads = [[layout.position_of(symbols) for symbols in live[rule]] for rule in kept]
    best = [layout.position_of(rules[rule][cheapest.production[rule] or 0]) for rule in kept]
    return layout.finish(heads, best)


def _silent(
    rules: Sequence[Sequence[Symbols]], terminals: Sequence[Terminal | None], effort: Effort
) -> set[int]:
    """The symbols that derive the empty text and no other."""
    is_silent = [terminal is not None and terminal.only_empty for terminal in terminals]
    heard = deriving_something(rules, is_silent, effort)
    silent_rules = {~rule for rule in range(len(rules)) if rule not in heard}
    return silent_rules | {number for number, silent in enumerate(is_silent) if silent}


def _affordable(price: int | None) -> int:
    assert price is not None
    if price // BYTE > _MAX_SHORTEST_BYTES:
        raise ConstraintTooComplex(
            f"a part of the constraint has no text of less than {_MAX_SHORTEST_BYTES} bytes"
        )
    return price


@dataclass(slots=True)
class _Layout:
    """Lays productions out as positions; rules and terminals get new numbers, without gaps."""

    terminals: Sequence[Terminal | None]
    new_rule: dict[int, int]
    effort: Effort
    silent: set[int] = field(default_factory=set)
    """Symbols to leave out: one behind a recursive call would keep that from being the last of its production."""
    rule_prices: list[int] = field(default_factory=list)
    new_terminal: dict[int, int] = field(default_factory=dict)
    used: list[Terminal] = field(default_factory=list)
    symbol: list[int] = field(default_factory=lambda: [0, 0])
    after: list[int] = field(default_factory=lambda: [END, END])
    cost: list[int] = field(default_factory=lambda: [0, 0])
    may_skip: list[bool] = field(default_factory=lambda: [False, False])
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def add_start(self) -> None:
        start = self._before(END, ~0, self.rule_prices[0])
        assert start == START

    def position_of(self, symbols: Symbols) -> int:
        """The position before `symbols`, which are given by their old numbers."""
        position = END
        for symbol in reversed(symbols):
            self.effort.spend()
            if symbol in self.silent:
                continue
            if symbol < 0:
                number = self.new_rule[~symbol]
                position = self._before(position, ~number, self.rule_prices[number])
                continue
            terminal = self.terminals[symbol]
            assert terminal is not None
            position = self._before(position, self._renumbered(symbol, terminal), terminal.cost[0])
        return position

    def finish(self, heads: Sequence[Sequence[int]], best: Sequence[int]) -> CompiledGrammar:
        return CompiledGrammar(
            terminals=tuple(self.used),
            symbol=tuple(self.symbol),
            after=tuple(self.after),
            cost=tuple(self.cost),
            may_skip=tuple(self.may_skip),
            openings=tuple(self._openings(positions) for positions in heads),
            best=tuple(best),
        )

    def _before(self, position: int, symbol: int, price: int) -> int:
        known = self._known.setdefault((symbol, position), len(self.symbol))
        if known == len(self.symbol):
            self.symbol.append(symbol)
            self.after.append(position)
            self.cost.append(price + self.cost[position])
            self.may_skip.append(price == 0)
        return known

    def _renumbered(self, symbol: int, terminal: Terminal) -> int:
        number = self.new_terminal.setdefault(symbol, len(self.used))
        if number == len(self.used):
            self.used.append(terminal)
        return number

    def _openings(self, heads: Sequence[int]) -> tuple[int, ...]:
        """A text may begin at the first symbol, and behind symbols that derive the empty text."""
        found: dict[int, None] = {}
        for head in heads:
            position = head
            while position != END and position not in found:
                self.effort.spend()
                found[position] = None
                if not self.may_skip[position]:
                    break
                position = self.after[position]
        return tuple(found)
