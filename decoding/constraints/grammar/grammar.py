"""Context-free grammars over characters: the one form that schemas, Lark, GBNF and structural tags are brought to.

The language is that of the rules alone ("scannerless"): terminals are regular expressions that may match any of
their strings wherever the rules ask for one. There is no lexer, no longest match, no priority.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from cadenza.decoding.constraints.automata.expression import EPSILON, Expression
from cadenza.decoding.constraints.limits import Effort

Symbol: TypeAlias = str | Expression
"""The name of a rule, or a terminal."""
Production: TypeAlias = tuple[Symbol, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    start: str
    rules: Mapping[str, tuple[Production, ...]]
    """The alternatives of each rule; the empty production derives the empty string, no production derives nothing."""


@dataclass(slots=True)
class GrammarBuilder:
    """Rules by name, and the EBNF operators as helper rules. Symbols in, symbols out."""

    effort: Effort
    rules: dict[str, tuple[Production, ...]] = field(default_factory=dict)
    _num_productions: int = 0
    _num_fresh: int = 0

    def fresh(self, hint: str) -> str:
        """A name that no rule has yet, declared by whoever asked."""
        self._num_fresh += 1
        return f"{hint}_{self._num_fresh}"

    def add(self, name: str, productions: Iterable[Production]) -> str:
        """Define a rule; a name is defined once."""
        assert name not in self.rules, name
        alternatives = tuple(productions)
        self._num_productions += len(alternatives)
        self.effort.check_rules(self._num_productions)
        self.effort.spend(1 + len(alternatives))
        self.rules[name] = alternatives
        return name

    def choice(self, productions: Iterable[Production], hint: str = "choice") -> str:
        return self.add(self.fresh(hint), productions)

    def sequence(self, *symbols: Symbol, hint: str = "sequence") -> str:
        return self.add(self.fresh(hint), [symbols])

    def optional(self, symbol: Symbol) -> str:
        return self.choice([(), (symbol,)], "optional")

    def repeat(self, symbol: Symbol, low: int, high: int | None, separator: Symbol | None = None) -> Symbol:
        """low to high times `symbol` (None: without bound), with `separator` between two of them."""
        if high == 0:
            return EPSILON
        if low == 0:
            return self.optional(self.repeat(symbol, 1, high, separator))
        between: Production = () if separator is None else (separator,)
        if high is None:
            tail = self.fresh("tail")
            self.add(tail, [(), (*between, symbol, tail)])
        else:
            tail = self.choice([()], "tail")
            for _ in range(high - low):
                tail = self.choice([(), (*between, symbol, tail)], "tail")
        for _ in range(low - 1):
            tail = self.sequence(*between, symbol, tail, hint="item")
        return self.sequence(symbol, tail, hint="items")

    def build(self, start: Symbol) -> Grammar:
        name = start if isinstance(start, str) else self.sequence(start, hint="start")
        return Grammar(name, dict(self.rules))
