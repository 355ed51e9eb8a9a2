"""What can be said of a grammar before any text: which rules derive something, and the cheapest that they derive.

Rules are numbered here, and so are terminals; symbol s >= 0 is terminal s, symbol s < 0 is rule ~s. Knows the price
of each terminal and nothing else of it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.limits import Effort

Symbols: TypeAlias = tuple[int, ...]
"""The right-hand side of a production."""


@dataclass(frozen=True, slots=True)
class Cheapest:
    """Per rule, None where the rule derives nothing."""

    price: list[int | None]
    production: list[int | None]
    """The index of the production that begins a cheapest derivation; following these always ends."""


def cheapest_derivations(
    rules: Sequence[Sequence[Symbols]], prices: Sequence[int | None], effort: Effort
) -> Cheapest:
    """Knuth's generalization of Dijkstra's algorithm (1977). prices: of terminals, None if nothing matches one."""
    result = Cheapest([None] * len(rules), [None] * len(rules))
    uses: list[list[tuple[int, int]]] = [[] for _ in rules]
    missing: dict[tuple[int, int], int] = {}
    totals: dict[tuple[int, int], int] = {}
    queue: list[tuple[int, int, int]] = []
    for rule, productions in enumerate(rules):
        for index, symbols in enumerate(productions):
            effort.spend(1 + len(symbols) // 8)
            of_terminals = [prices[s] for s in symbols if s >= 0]
            known = [price for price in of_terminals if price is not None]
            if len(known) < len(of_terminals):
                continue
            unknown = [~s for s in symbols if s < 0]
            totals[rule, index], missing[rule, index] = sum(known), len(unknown)
            for used in unknown:
                uses[used].append((rule, index))
            if not unknown:
                queue.append((totals[rule, index], rule, index))
    heapq.heapify(queue)
    while queue:
        price, rule, index = heapq.heappop(queue)
        effort.spend()
        if result.price[rule] is not None:
            continue
        result.price[rule], result.production[rule] = price, index
        for use in uses[rule]:
            effort.spend()
            totals[use] += price
            missing[use] -= 1
            if missing[use] == 0:
                heapq.heappush(queue, (totals[use], *use))
    return result


def reachable(rules: Sequence[Sequence[Symbols]], start: int, effort: Effort) -> list[int]:
    """The rules that derivations from `start` use, `start` first, in the order in which they are met."""
    met, order = {start}, [start]
    for rule in order:  # grows while it is walked
        for symbols in rules[rule]:
            effort.spend(1 + len(symbols) // 8)
            for symbol in symbols:
                if symbol < 0 and ~symbol not in met:
                    met.add(~symbol)
                    order.append(~symbol)
    return order


def deriving_something(
    rules: Sequence[Sequence[Symbols]], is_empty: Sequence[bool], effort: Effort
) -> set[int]:
    """The rules that derive more than the empty text. is_empty: the terminals that match no other."""
    users: list[list[int]] = [[] for _ in rules]
    found: dict[int, None] = {}
    for rule, productions in enumerate(rules):
        for symbols in productions:
            effort.spend(1 + len(symbols) // 8)
            for symbol in symbols:
                if symbol < 0:
                    users[~symbol].append(rule)
                elif not is_empty[symbol]:
                    found[rule] = None
    order = list(found)
    for rule in order:  # grows while it is walked
        for user in users[rule]:
            effort.spend()
            if user not in found:
                found[user] = None
                order.append(user)
    return set(found)
