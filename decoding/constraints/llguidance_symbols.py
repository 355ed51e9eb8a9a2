"""A grammar in the form in which llguidance can have it: numbered symbols, no terminal that matches the empty text,
no rule without use.

Knows nothing of lexing; that is `llguidance_conflicts`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    concat,
    either,
)
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_automata import byte_mask
from cadenza.decoding.constraints.llguidance_automata import without_empty as automaton_without_empty

Code: TypeAlias = int
"""A symbol: terminal t as t, rule r as ~r."""
Sequence: TypeAlias = tuple[Code, ...]


@dataclass(slots=True)
class Terminal:
    """Never matches the empty text, always matches something."""

    expression: Expression
    dfa: DFA | None
    """Of anything but a literal. Trimmed; not necessarily minimal."""

    @property
    def text(self) -> bytes:
        """Of a literal."""
        assert isinstance(self.expression, Literal)
        return self.expression.text.encode()

    def first_bytes(self) -> int:
        """Bit b is set if a match can begin with byte b."""
        if self.dfa is None:
            return 1 << self.text[0]
        return byte_mask(np.flatnonzero((self.dfa.table[0] >= 0)[self.dfa.byte_class]).tolist())


@dataclass(slots=True)
class Symbols:
    """Rule 0 is the start."""

    effort: Effort
    terminals: list[Terminal] = field(default_factory=list)
    rules: list[list[Sequence]] = field(default_factory=list)
    _known: dict[Expression, Code | None] = field(default_factory=dict)

    def add_rule(self, alternatives: Iterable[Sequence] = ()) -> Code:
        self.rules.append(list(alternatives))
        self.effort.check_rules(len(self.rules))
        return ~(len(self.rules) - 1)

    def add_terminal(self, terminal: Terminal) -> Code:
        self.terminals.append(terminal)
        return len(self.terminals) - 1

    def add_piece(self, expression: Expression, dfa: DFA) -> Code:
        """A part of a terminal. Only sets of characters are looked up: the others share parts, and may be deep."""
        if not isinstance(expression, CharSet):
            return self.add_terminal(Terminal(expression, dfa))
        if (known := self._known.get(expression)) is None:
            known = self._known[expression] = self.add_terminal(Terminal(expression, dfa))
        return known

    def symbol(self, expression: Expression) -> Code | None:
        """What stands for the expression; None if it matches nothing."""
        if expression not in self._known:
            self.effort.spend(2)
            self._known[expression] = self._new_symbol(expression)
        return self._known[expression]

    def forget(self) -> None:
        """Codes have changed: know no more than the simplest terminals."""
        self._known = {
            terminal.expression: code
            for code, terminal in enumerate(self.terminals)
            if isinstance(terminal.expression, CharSet | Literal)
        }

    def _new_symbol(self, expression: Expression) -> Code | None:
        if isinstance(expression, Literal):
            if any("\ud800" <= character <= "\udfff" for character in expression.text):
                raise ConstraintError("a surrogate is not a character that text can contain")
            return self.add_terminal(Terminal(expression, None)) if expression.text else self.add_rule([()])
        dfa = to_dfa(expression, self.effort)
        if dfa.is_empty:
            return None
        if not dfa.accepting[0]:
            return self.add_terminal(Terminal(expression, dfa))
        dfa = automaton_without_empty(dfa)
        if dfa.is_empty:
            return self.add_rule([()])
        return self.add_rule([(), (self.add_terminal(Terminal(without_empty(expression), dfa)),)])


def symbols_of(grammar: Grammar, effort: Effort) -> Symbols:
    """Raises ConstraintError if the grammar derives no text."""
    symbols = Symbols(effort)
    codes = {name: ~number for number, name in enumerate(_start_first(grammar))}
    symbols.rules = [[] for _ in codes]
    objects: dict[int, Code | None] = {}
    for name, code in codes.items():
        for production in grammar.rules[name]:
            effort.spend(1 + len(production) // 4)
            sequence: list[Code | None] = []
            for symbol in production:
                if isinstance(symbol, str):
                    if symbol not in codes:
                        raise ConstraintError(f"the rule {symbol!r} is not defined")
                    sequence.append(codes[symbol])
                    continue
                if id(symbol) not in objects:  # the same object is quicker known again than its equal
                    objects[id(symbol)] = symbols.symbol(symbol)
                sequence.append(objects[id(symbol)])
            if None not in sequence:
                symbols.rules[~code].append(tuple(s for s in sequence if s is not None))
    prune(symbols)
    _recurse_left(symbols)
    return symbols


def _recurse_left(symbols: Symbols) -> None:
    """R: b | a R becomes R: A b and A: | A a. An Earley parser completes all of a right-recursive list again at each
    of its items; a left-recursive list costs it the same at every item.
    """
    for rule in range(len(symbols.rules)):
        code = ~rule
        alternatives = symbols.rules[rule]
        repeated = [s[:-1] for s in alternatives if s and s[-1] == code]
        if not repeated or any(s and s[0] == code for s in alternatives):
            continue
        last = [s for s in alternatives if not s or s[-1] != code]
        if last == [()]:
            symbols.rules[rule] = [(), *((code, *sequence) for sequence in repeated)]
            continue
        many = symbols.add_rule([()])
        symbols.rules[~many] += [(many, *sequence) for sequence in repeated]
        symbols.rules[rule] = [(many, *sequence) for sequence in last]


def _start_first(grammar: Grammar) -> Iterator[str]:
    yield grammar.start
    yield from (name for name in grammar.rules if name != grammar.start)


def prune(symbols: Symbols) -> None:
    """Drop the productions that derive no text, rules that the start does not reach, and unused terminals."""
    productive = _productive(symbols)
    if not productive[0]:
        raise ConstraintError("no text satisfies the constraint")
    new_rules: dict[int, int] = {0: 0}
    new_terminals: dict[int, int] = {}
    kept: list[list[Sequence]] = []
    pending = [0]
    for rule in pending:
        alternatives: list[Sequence] = []
        for sequence in symbols.rules[rule]:
            symbols.effort.spend(1 + len(sequence) // 4)
            if not all(code >= 0 or productive[~code] for code in sequence) or sequence == (~rule,):
                continue
            renamed = []
            for code in sequence:
                if code >= 0:
                    renamed.append(new_terminals.setdefault(code, len(new_terminals)))
                else:
                    if ~code not in new_rules:
                        new_rules[~code] = len(new_rules)
                        pending.append(~code)
                    renamed.append(~new_rules[~code])
            alternatives.append(tuple(renamed))
        kept.append(list(dict.fromkeys(alternatives)))
    symbols.rules = kept
    symbols.terminals = [symbols.terminals[old] for old in new_terminals]
    symbols.forget()


def _productive(symbols: Symbols) -> list[bool]:
    productive = [False] * len(symbols.rules)
    waiting: list[list[tuple[int, list[int]]]] = [[] for _ in symbols.rules]
    fresh: list[int] = []
    for rule, alternatives in enumerate(symbols.rules):
        for sequence in alternatives:
            symbols.effort.spend(1 + len(sequence) // 4)
            needed = {~code for code in sequence if code < 0}
            counter = [len(needed)]
            for other in needed:
                waiting[other].append((rule, counter))
            if not needed:
                fresh.append(rule)
    while fresh:
        rule = fresh.pop()
        if productive[rule]:
            continue
        productive[rule] = True
        for user, counter in waiting[rule]:
            symbols.effort.spend()
            counter[0] -= 1
            if counter[0] == 0:
                fresh.append(user)
    return productive


def is_nullable(expression: Expression) -> bool:
    match expression:
        case Literal(text):
            return not text
        case CharSet():
            return False
        case Concat(parts) | And(parts):
            return all(map(is_nullable, parts))
        case Alternation(options):
            return any(map(is_nullable, options))
        case Repeat(body, low, high):
            return low == 0 or (is_nullable(body) and (high is None or high >= low))
        case Not(body):
            return not is_nullable(body)


def without_empty(expression: Expression) -> Expression:
    """What the expression matches except the empty text. Stays a plain regular expression where it can."""
    if not is_nullable(expression):
        return expression
    match expression:
        case Alternation(options):
            return either(*map(without_empty, options))
        case Repeat(body, low, high) if high is None or high >= max(1, low):
            # a nullable body may be repeated fewer times than `low`
            return Repeat(without_empty(body), 1, high)
        case Concat(parts) if len(parts) == 2:
            first, second = parts
            return either(concat(without_empty(first), second), without_empty(second))
        case Literal() | Repeat():
            return Alternation(())
        case _:
            return And((expression, Not(EPSILON)))
