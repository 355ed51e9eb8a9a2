"""Which symbols may begin a text, and which may come after each terminal: FIRST and FOLLOW sets of a grammar.

Sets are integers with a bit for each member; what the members are, bytes or terminals, is the caller's choice.
"""

from dataclasses import dataclass

from cadenza.decoding.constraints.llguidance_symbols import Symbols


@dataclass(frozen=True, slots=True)
class Context:
    starts: int
    """What a text may begin with."""
    follow: list[int]
    """By terminal, what may come after it."""


def context(symbols: Symbols, leaves: list[int]) -> Context:
    """leaves: by terminal, the set that stands for it."""
    order = _callees_first(symbols)
    nullable, first = _nullable(symbols, order), [0] * len(symbols.rules)
    rules, spend = symbols.rules, symbols.effort.spend
    changed = True
    while changed:
        changed = False
        for rule in order:
            found = first[rule]
            for sequence in rules[rule]:
                spend()
                for code in sequence:
                    found |= leaves[code] if code >= 0 else first[~code]
                    if code >= 0 or not nullable[~code]:
                        break
            if found != first[rule]:
                first[rule], changed = found, True
    after_rule, after_terminal = [0] * len(rules), [0] * len(leaves)
    changed = True
    while changed:
        changed = False
        for rule in reversed(order):
            for sequence in rules[rule]:
                spend()
                following = after_rule[rule]
                for code in reversed(sequence):
                    if code >= 0:
                        after_terminal[code] |= following
                        following = leaves[code]
                        continue
                    callee = ~code
                    if following & ~after_rule[callee]:
                        after_rule[callee] |= following
                        changed = True
                    following = first[callee] | (following if nullable[callee] else 0)
    return Context(first[0], after_terminal)


def _callees_first(symbols: Symbols) -> list[int]:
    """The rules in the order in which a walk from the start leaves them."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(_callees(symbols, 0)))]
    while stack:
        rule, callees = stack[-1]
        callee = next((c for c in callees if c not in seen), None)
        if callee is None:
            order.append(rule)
            stack.pop()
        else:
            symbols.effort.spend()
            seen.add(callee)
            stack.append((callee, iter(_callees(symbols, callee))))
    return order


def _callees(symbols: Symbols, rule: int) -> list[int]:
    return [~code for sequence in symbols.rules[rule] for code in sequence if code < 0]


def _nullable(symbols: Symbols, order: list[int]) -> list[bool]:
    nullable = [False] * len(symbols.rules)
    changed = True
    while changed:
        changed = False
        for rule in order:
            symbols.effort.spend()
            if not nullable[rule] and any(
                all(code < 0 and nullable[~code] for code in sequence) for sequence in symbols.rules[rule]
            ):
                nullable[rule] = changed = True
    return nullable
