"""From a grammar to what the parser runs. Done once per constraint, where constraints are compiled."""

from collections.abc import Sequence

from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex, MatcherError
from cadenza.decoding.constraints.grammar.analysis import (
    Symbols,
    cheapest_derivations,
    deriving_something,
    reachable,
)
from cadenza.decoding.constraints.grammar.closure import Closer
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.grammar.numbering import Numbering
from cadenza.decoding.constraints.grammar.positions import CompiledGrammar, Layout
from cadenza.decoding.constraints.grammar.terminal import BYTE, Terminal
from cadenza.decoding.constraints.limits import Effort

__all__ = ["CompiledGrammar", "compile_grammar"]

_MAX_SHORTEST_BYTES = 1_000_000


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
    layout = Layout(terminals, {rule: number for number, rule in enumerate(kept)}, effort)
    layout.silent = _silent(live, terminals, effort)
    layout.rule_prices = [_affordable(cheapest.price[rule]) for rule in kept]
    layout.add_start()
    heads = [[layout.position_of(symbols) for symbols in live[rule]] for rule in kept]
    best = [layout.position_of(rules[rule][cheapest.production[rule] or 0]) for rule in kept]
    compiled = layout.finish(heads, best)
    _check_start(compiled)
    return compiled


def _check_start(compiled: CompiledGrammar) -> None:
    try:
        Closer(compiled).start()
    except MatcherError as error:
        raise ConstraintTooComplex(str(error)) from None


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
