"""Output constraints: compiled once, enforced token by token, always complete and valid at the end.

    automata/   regular expressions → minimal automata over bytes
    grammar/    context-free grammars over those, their parser, the shortest way to a complete text
    schema/     JSON Schema → grammar
    syntax/     Lark, GBNF/EBNF, structural tags → grammar

Nothing here imports torch: constraints are compiled in a process of their own.
"""
