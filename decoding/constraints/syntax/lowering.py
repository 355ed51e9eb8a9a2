"""Rules in extended Backus-Naur form to a Grammar.

Names stand for rules or for whole grammars written elsewhere. Parts that are regular become one terminal, however
many rules they are spread over (see `fragments`): the parser then follows an automaton instead of a chart. Knows
nothing of how rules are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cadenza.decoding.constraints.grammar.grammar import Grammar, GrammarBuilder, Production
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.fragments import Fragment, joined, measured, repeated, united
from cadenza.decoding.constraints.syntax.regular import regular_rules
from cadenza.decoding.constraints.syntax.rules import (
    Body,
    Complement,
    Group,
    Intersection,
    Item,
    Reference,
)


def to_grammar(
    rules: Mapping[str, Body], start: str, effort: Effort, grammars: Mapping[str, Grammar] | None = None
) -> Grammar:
    """The grammar of the rules that `start` reaches. Every name referred to must be one of `rules` or `grammars`."""
    lowering = _Lowering(rules, grammars or {}, regular_rules(rules, effort), GrammarBuilder(effort))
    return lowering.grammar(start)


def add_grammar(builder: GrammarBuilder, grammar: Grammar, prefix: str) -> str:
    """Add all rules of a grammar under names of their own; returns the name of its start."""
    for name, productions in grammar.rules.items():
        builder.effort.spend(len(productions))
        builder.add(
            f"{prefix}/{name}",
            [
                tuple(f"{prefix}/{symbol}" if isinstance(symbol, str) else symbol for symbol in production)
                for production in productions
            ],
        )
    return f"{prefix}/{grammar.start}"


Part: TypeAlias = Fragment | str
"""Of a sequence: a regular stretch, or the name of a rule."""


@dataclass(slots=True)
class _Lowering:
    rules: Mapping[str, Body]
    grammars: Mapping[str, Grammar]
    regular: Mapping[str, Fragment]
    builder: GrammarBuilder
    _added: dict[str, str] = field(default_factory=dict)
    _pending: list[str] = field(default_factory=list)

    def grammar(self, start: str) -> Grammar:
        if start in self.regular:
            return self.builder.build(self.regular[start].expression)
        name = self._rule(start)
        while self._pending:
            rule = self._pending.pop()
            self.builder.add(self._added[rule], self._productions(self._alternatives(self.rules[rule])))
        return self.builder.build(name)

    def _rule(self, name: str) -> str:
        if name not in self._added:
            if name in self.grammars:
                self._added[name] = add_grammar(self.builder, self.grammars[name], name)
            else:
                self._added[name] = f"<{name}>"  # no helper rule of the builder has such a name
                self._pending.append(name)
        return self._added[name]

    def _alternatives(self, body: Body) -> list[list[Part]]:
        """The options as sequences of parts; options that are regular as one."""
        options: list[list[Part]] = []
        regular: list[Fragment] = []
        for sequence in body:
            self.builder.effort.spend()
            parts = self._parts(sequence)
            if len(parts) == 1 and isinstance(parts[0], Fragment):
                regular.append(parts[0])
            else:
                options.append(parts)
        together: list[list[Part]] = [[fragment] for fragment in united(regular, self.builder.effort)]
        return together + options

    def _parts(self, sequence: Sequence[Item]) -> list[Part]:
        """Recursion is as deep as brackets are nested, two calls a level."""
        parts: list[Part] = []
        for item in sequence:
            self.builder.effort.spend()
            if isinstance(item, Reference):
                parts.append(self.regular.get(item.name) or self._rule(item.name))
            elif isinstance(item, Group):
                parts += self._group(item, self._alternatives(item.options))
            else:
                assert not isinstance(item, Intersection | Complement)
                parts.append(measured(item, self.builder.effort))
        return joined(parts, self.builder.effort)

    def _group(self, group: Group, options: list[list[Part]]) -> list[Part]:
        if len(options) == 1 and len(options[0]) == 1 and isinstance(options[0][0], Fragment):
            fragment = repeated(options[0][0], group.low, group.high, self.builder.effort)
            if fragment is not None:
                return [fragment]
        if len(options) == 1 and (group.low, group.high) == (1, 1):
            return options[0]
        productions = self._productions(options)
        if (group.low, group.high) == (0, 1):
            return [self.builder.choice([(), *productions], "optional")]
        name = self.builder.choice(productions)
        repetition = self.builder.repeat(name, group.low, group.high)
        return [repetition if isinstance(repetition, str) else measured(repetition, self.builder.effort)]

    def _productions(self, options: list[list[Part]]) -> list[Production]:
        return [
            tuple(part.expression if isinstance(part, Fragment) else part for part in parts)
            for parts in options
        ]
