"""Grammar languages that people write (Lark, GBNF and EBNF, structural tags) to grammars."""

from cadenza.decoding.constraints.syntax.choice import choice_expression
from cadenza.decoding.constraints.syntax.structural_tag import structural_tag_grammar
from cadenza.decoding.constraints.syntax.text import grammar_from_text

__all__ = ["choice_expression", "grammar_from_text", "structural_tag_grammar"]
