"""Names and expressions to numbers: the first step of compiling a grammar. Knows nothing of what rules derive."""

from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.build import to_dfa
from cadenza.decoding.constraints.automata.expression import Expression, Literal
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.analysis import Symbols
from cadenza.decoding.constraints.grammar.grammar import Grammar, Production
from cadenza.decoding.constraints.grammar.terminal import Terminal, literal_terminal, terminal_of
from cadenza.decoding.constraints.limits import Effort

_MAX_TABLE_ENTRIES = 10_000_000
_MAX_LITERAL = 10_000
"""Characters of a string that is compiled on the short way; longer ones meet the limits on automata."""


@dataclass(slots=True)
class Numbering:
    """Numbers rules and terminals as they are met, and compiles each distinct terminal once."""

    effort: Effort
    terminals: list[Terminal | None] = field(default_factory=list)
    """None where the expression matches nothing."""
    _names: list[str] = field(default_factory=list)
    _rules: dict[str, int] = field(default_factory=dict)
    _terminals: dict[Expression, int] = field(default_factory=dict)
    _terminals_by_id: dict[int, int] = field(default_factory=dict)
    """Hashing a large expression takes long, and most symbols are objects met before."""
    _num_entries: int = 0

    def rules_of(self, grammar: Grammar) -> list[list[Symbols]]:
        """The productions of all rules that the start, which is rule 0, leads to."""
        self._rule(grammar.start)
        rules: list[list[Symbols]] = []
        num_productions = 0
        for name in self._names:  # grows while it is walked
            if name not in grammar.rules:
                raise ConstraintError(f"the rule {name!r} is not defined")
            productions = grammar.rules[name]
            num_productions += len(productions)
            self.effort.check_rules(num_productions)
            rules.append(list(dict.fromkeys(self._symbols(p) for p in productions)))
        return rules

    def _symbols(self, production: Production) -> Symbols:
        self.effort.spend(1 + len(production) // 4)
        return tuple(
            ~self._rule(symbol) if isinstance(symbol, str) else self._terminal(symbol)
            for symbol in production
        )

    def _rule(self, name: str) -> int:
        number = self._rules.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        return number

    def _terminal(self, expression: Expression) -> int:
        known = self._terminals_by_id.get(id(expression))
        if known is None:
            try:
                known = self._terminals.get(expression)
            except RecursionError:  # hashing goes as deep as the expression
                raise ConstraintTooComplex("a terminal of the constraint is nested too deeply") from None
            if known is None:
                known = self._terminals[expression] = len(self.terminals)
                self.terminals.append(self._compiled(expression))
            self._terminals_by_id[id(expression)] = known
        return known

    def _compiled(self, expression: Expression) -> Terminal | None:
        self.effort.spend(8)
        if (
            isinstance(expression, Literal)
            and len(expression.text) <= _MAX_LITERAL
            and _is_text(expression.text)
        ):
            terminal: Terminal | None = literal_terminal(expression.text.encode())
        else:
            dfa = to_dfa(expression, self.effort)
            terminal = None if dfa.is_empty else terminal_of(dfa, self.effort)
        if terminal is not None:
            self._account(terminal)
        return terminal

    def _account(self, terminal: Terminal) -> None:
        self._num_entries += len(terminal.table)
        if self._num_entries > _MAX_TABLE_ENTRIES:
            raise ConstraintTooComplex(
                f"the constraint's terminals need automata with more than {_MAX_TABLE_ENTRIES} transitions"
            )


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
