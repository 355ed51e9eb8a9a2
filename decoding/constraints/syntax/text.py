"""Which language a grammar is written in."""

import re

from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.gbnf import gbnf_grammar
from cadenza.decoding.constraints.syntax.lark import lark_grammar

_GBNF_DEFINITION = re.compile(r"^[ \t]*+[A-Za-z0-9_-]++\s*+::=", re.MULTILINE)
"""At the beginning of a line: inside a string, Lark grammars may have `::=`, too."""


def grammar_from_text(text: str, effort: Effort) -> Grammar:
    """GBNF or EBNF if rules are written `name ::= ...`, otherwise Lark."""
    if _GBNF_DEFINITION.search(text):
        return gbnf_grammar(text, effort)
    return lark_grammar(text, effort)
