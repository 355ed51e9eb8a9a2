"""Grammar languages that people write (Lark, GBNF and EBNF, structural tags) to grammars."""

from cadenza.decoding.constraints.syntax.choice import choice_expression
from cadenza.decoding.constraints.syntax.text import grammar_from_text

__all__ = ["choice_expression", "grammar_from_text"]
