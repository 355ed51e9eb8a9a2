"""A grammar as the parser runs it: terminals as automata, the rules as linked positions with their prices.

Picklable. Knows nothing of any text, nor of the grammar's source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadenza.decoding.constraints.grammar.analysis import Symbols
from cadenza.decoding.constraints.grammar.terminal import BYTE, Terminal
from cadenza.decoding.constraints.limits import Effort

END, ACCEPT, START = 0, 1, 2
"""The position at the end of every production, the one behind the whole text, and the one before it."""


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


@dataclass(slots=True)
class Layout:
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
