"""Prints a grammar for llguidance so that its greedy lexer accepts exactly the grammar's language.

A terminal stays one lexeme wherever longest match cannot change the language (see `llguidance_conflicts`); others
are cut into lexemes with which it cannot (see `llguidance_pieces`), until no conflict is left. Cutting ends: at the
worst every lexeme is one character.
"""

from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.llguidance_conflicts import cuts
from cadenza.decoding.constraints.llguidance_expressions import TerminalPrinter
from cadenza.decoding.constraints.llguidance_pieces import cut_terminal
from cadenza.decoding.constraints.llguidance_symbols import Code, Symbols, prune, symbols_of

_OPTIONS = '%llguidance {"no_forcing": true}'
"""Otherwise, where only one text may follow, only its canonical tokenization would be allowed."""
_MAX_SYMBOLS = 20_000
"""Rules and terminals of the printed grammar: what llguidance reads in about a second."""


def to_llguidance(grammar: Grammar, effort: Effort) -> str:
    """Raises ConstraintError if the grammar derives no text."""
    symbols = symbols_of(grammar, effort)
    _check_size(symbols)
    while found := cuts(symbols):
        replaced = {
            code: cut_terminal(symbols, symbols.terminals[code], places) for code, places in found.items()
        }
        _replace(symbols, replaced)
        prune(symbols)
        _check_size(symbols)
    return _printed(symbols)


def _check_size(symbols: Symbols) -> None:
    if len(symbols.rules) + len(symbols.terminals) > _MAX_SYMBOLS:
        raise ConstraintTooComplex(f"the constraint needs more than {_MAX_SYMBOLS} rules and terminals")


def _replace(symbols: Symbols, replaced: dict[Code, Code]) -> None:
    for alternatives in symbols.rules:
        for index, sequence in enumerate(alternatives):
            symbols.effort.spend()
            if any(code in replaced for code in sequence):
                alternatives[index] = tuple(replaced.get(code, code) for code in sequence)


def _printed(symbols: Symbols) -> str:
    printer = TerminalPrinter(symbols.effort)
    atoms = [printer.atom(terminal.expression) for terminal in symbols.terminals]
    rules = []
    for number, alternatives in enumerate(symbols.rules):
        symbols.effort.spend(1 + len(alternatives))
        body = " | ".join(
            " ".join(atoms[code] if code >= 0 else f"r{~code}" for code in sequence) or '""'
            for sequence in alternatives
        )
        rules.append(f"r{number}: {body}")
    return "\n".join([_OPTIONS, "start: r0", *rules, *printer.lines, ""])
