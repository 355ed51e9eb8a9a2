"""Removing what derives no text: alternatives without a finite derivation, rules that nothing reaches."""

from collections import defaultdict
from collections.abc import Mapping

from cadenza.decoding.constraints.automata.expression import NOTHING
from cadenza.decoding.constraints.grammar.grammar import Production
from cadenza.decoding.constraints.limits import Effort


def productive(
    rules: Mapping[str, tuple[Production, ...]], start: str, effort: Effort
) -> dict[str, tuple[Production, ...]]:
    """The rules that take part in deriving some text from `start`; none if there is no text."""
    alive = _deriving(rules, effort)
    kept: dict[str, tuple[Production, ...]] = {}
    stack = [start] if start in alive else []
    while stack:
        name = stack.pop()
        if name in kept:
            continue
        kept[name] = tuple(p for p in rules[name] if _lives(p, alive))
        effort.spend(1 + len(kept[name]))
        stack.extend(symbol for p in kept[name] for symbol in p if isinstance(symbol, str))
    return kept


def _lives(production: Production, alive: set[str]) -> bool:
    return all(symbol in alive if isinstance(symbol, str) else symbol != NOTHING for symbol in production)


def _deriving(rules: Mapping[str, tuple[Production, ...]], effort: Effort) -> set[str]:
    """Counts down the rules that an alternative still waits for."""
    waiting: dict[str, list[list[int | str]]] = defaultdict(list)
    alive: set[str] = set()
    stack: list[str] = []

    def derive(name: str) -> None:
        if name not in alive:
            alive.add(name)
            stack.append(name)

    for name, productions in rules.items():
        for production in productions:
            effort.spend()
            if any(symbol == NOTHING for symbol in production):
                continue
            needed = {symbol for symbol in production if isinstance(symbol, str)}
            entry: list[int | str] = [len(needed), name]
            for symbol in needed:
                waiting[symbol].append(entry)
            if not needed:
                derive(name)
    while stack:
        for entry in waiting[stack.pop()]:
            effort.spend()
            assert isinstance(entry[0], int)
            entry[0] -= 1
            if entry[0] == 0:
                derive(str(entry[1]))
    return alive
