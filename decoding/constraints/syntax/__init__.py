"""Grammar languages that people write (Lark, GBNF and EBNF, structural tags) to grammars."""
