"""GBNF, the grammar language of llama.cpp, and the EBNF of xgrammar and SGLang, to a Grammar."""

from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.gbnf_reader import read_gbnf
from cadenza.decoding.constraints.syntax.lowering import to_grammar
from cadenza.decoding.constraints.syntax.rules import references

_START = "root"


def gbnf_grammar(text: str, effort: Effort) -> Grammar:
    """Raises ConstraintError with line and column where the text is not GBNF or a name is not defined."""
    source, rules = read_gbnf(text, effort)
    if _START not in rules:
        raise ConstraintError(f"the grammar has no rule {_START!r} to start with")
    for body in rules.values():
        for reference in references(body):
            effort.spend()
            if reference.name not in rules:
                raise source.error(f"rule {reference.name!r} is not defined", reference.position)
    return to_grammar(rules, _START, effort, has_lexemes=False)
