"""Terminals, or rules where those would be too large, for sets of strings."""

from cadenza.decoding.constraints.automata.expression import Expression, Literal, Repeat, concat, either
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder, Production, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.json_text import (
    ANY_STRING,
    CANONICAL_CHARACTER,
    QUOTE,
    encode,
    quoted,
    spelling,
)
from cadenza.decoding.constraints.schema.string_part import StringPart

BLOCK = 256
"""Characters counted by one terminal; longer counts are rules over blocks of so many characters."""
_MAX_BLOCKS = 4096


def string_symbols(parts: tuple[StringPart, ...], builder: GrammarBuilder, effort: Effort) -> list[Symbol]:
    """What derives the JSON texts of the strings: at most one terminal, and a rule for each very long count."""
    rules: list[Symbol] = []
    terminals: dict[Expression, None] = {}
    for part in parts:
        effort.spend()
        if part.only_length and max(part.low, part.high or 0) > BLOCK:
            rules.append(_counted(part.low, part.high, builder))
        elif part.values is not None:
            terminals.update((Literal(f'"{spelling(value)}"'), None) for value in part.values)
        else:
            terminals[_terminal(part, effort)] = None
    return [either(*terminals), *rules] if terminals else rules


def _terminal(part: StringPart, effort: Effort) -> Expression:
    return ANY_STRING if part == StringPart() else quoted(encode(part.expression(), effort))


def _counted(low: int, high: int | None, builder: GrammarBuilder) -> str:
    """Strings of low to high characters. Each terminal is a whole block, or the rest with the closing quote."""
    last = low // BLOCK if high is None else high // BLOCK
    if last > _MAX_BLOCKS:
        raise ConstraintTooComplex(
            f"a string's length is bounded by more than {_MAX_BLOCKS * BLOCK} characters"
        )
    block = Repeat(CANONICAL_CHARACTER, BLOCK, BLOCK)
    tail: Symbol | None = None
    for i in reversed(range(last + 1)):
        start = i * BLOCK
        begin = QUOTE if i == 0 else Literal("")
        productions: list[Production] = []
        least = max(low - start, 0)
        most = (
            None
            if high is None and i == last
            else BLOCK - 1
            if high is None
            else min(BLOCK - 1, high - start)
        )
        if most is None or least <= most:
            productions.append((concat(begin, Repeat(CANONICAL_CHARACTER, least, most), QUOTE),))
        if tail is not None:
            productions.append((concat(begin, block), tail))
        tail = builder.choice(productions, "text")
    assert isinstance(tail, str)
    return tail
