"""Rules in extended Backus-Naur form to a Grammar.

Names stand for rules or for whole grammars written elsewhere. Regular parts may become single terminals, which is
cheaper to follow; how far that should go depends on what the language's terminals are. Knows nothing of how rules
are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cadenza.decoding.constraints.automata.expression import EPSILON, Expression
from cadenza.decoding.constraints.grammar.grammar import Grammar, GrammarBuilder, Production, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.fragments import Fragment, is_word, union
from cadenza.decoding.constraints.syntax.regular import regular_body, regular_rules
from cadenza.decoding.constraints.syntax.rules import Body, Complement, Group, Intersection, Item, Reference


def to_grammar(
    rules: Mapping[str, Body],
    start: str,
    effort: Effort,
    *,
    has_lexemes: bool,
    grammars: Mapping[str, Grammar] | None = None,
) -> Grammar:
    """The grammar of the rules that `start` reaches. Every name referred to must be one of `rules` or `grammars`.

    has_lexemes: the terminals are words already, as their author divided the language. Then they stay apart, unless
    the language as a whole is regular. Otherwise they are characters, and regular rules become terminals.
    """
    regular = regular_rules(rules, effort)
    if start in regular:
        return GrammarBuilder(effort).build(regular[start].expression)
    lowering = _Lowering(rules, grammars or {}, None if has_lexemes else regular, GrammarBuilder(effort))
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


def united_words(body: Body) -> Body:
    """The alternatives that are words as one: thousands of them make one automaton."""
    words: list[Expression] = []
    others: list[tuple[Item, ...]] = []
    for option in body:
        only = option[0] if len(option) == 1 else None
        if isinstance(only, Expression) and is_word(only):
            words.append(only)
        else:
            others.append(option)
    return body if len(words) < 2 else ((union(words),), *others)


@dataclass(slots=True)
class _Lowering:
    rules: Mapping[str, Body]
    grammars: Mapping[str, Grammar]
    regular: Mapping[str, Fragment] | None
    """None: terminals stay as they are."""
    builder: GrammarBuilder
    _added: dict[str, str] = field(default_factory=dict)
    _pending: list[str] = field(default_factory=list)

    def grammar(self, start: str) -> Grammar:
        name = self._rule(start)
        while self._pending:
            rule = self._pending.pop()
            self.builder.add(self._added[rule], self._productions(self.rules[rule]))
        return self.builder.build(name)

    def _rule(self, name: str) -> str:
        if name not in self._added:
            if name in self.grammars:
                self._added[name] = add_grammar(self.builder, self.grammars[name], name)
            else:
                self._added[name] = f"<{name}>"  # no helper rule of the builder has such a name
                self._pending.append(name)
        return self._added[name]

    def _productions(self, body: Body) -> list[Production]:
        """Recursion is as deep as brackets are nested, three calls a level."""
        productions: list[Production] = []
        for sequence in united_words(body):
            self.builder.effort.spend()
            production: list[Symbol] = []
            for item in sequence:
                production.extend(self._symbols(item))
            productions.append(tuple(production))
        return productions

    def _symbols(self, item: Item) -> Sequence[Symbol]:
        self.builder.effort.spend()
        if isinstance(item, Reference):
            known = self.regular.get(item.name) if self.regular is not None else None
            return [self._rule(item.name)] if known is None else _unless_empty(known.expression)
        if isinstance(item, Group):
            return self._group(item)
        assert not isinstance(item, Intersection | Complement)
        return _unless_empty(item)

    def _group(self, group: Group) -> Sequence[Symbol]:
        if self.regular is not None:
            fragment = regular_body(((group,),), self.regular, self.builder.effort)
            if fragment is not None:
                return _unless_empty(fragment.expression)
        productions = self._productions(group.options)
        if len(productions) == 1 and (group.low, group.high) == (1, 1):
            return productions[0]
        if (group.low, group.high) == (0, 1):
            return [self.builder.choice([(), *productions], "optional")]
        symbol: Symbol
        if len(productions) == 1 and len(productions[0]) == 1:
            symbol = productions[0][0]
        else:
            symbol = self.builder.choice(productions)
        return _unless_empty(self.builder.repeat(symbol, group.low, group.high))


def _unless_empty(symbol: Symbol) -> Sequence[Symbol]:
    return [] if symbol == EPSILON else [symbol]
