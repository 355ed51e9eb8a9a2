"""Lark's grammar language to a Grammar.

The language is that of the grammar alone, as Lark's Earley parser with its complete dynamic lexer sees it: no
priorities, no longest match. Ignored text may stand before, between and after terminals, never inside one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import Grammar
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions, schema_grammar
from cadenza.decoding.constraints.syntax.lark_reader import LarkGrammar, read_lark
from cadenza.decoding.constraints.syntax.lark_spacing import Spacing, spacing
from cadenza.decoding.constraints.syntax.lark_templates import without_templates
from cadenza.decoding.constraints.syntax.lark_terminals import terminal_expressions
from cadenza.decoding.constraints.syntax.lowering import to_grammar, united_words
from cadenza.decoding.constraints.syntax.rules import (
    Body,
    Complement,
    Group,
    Intersection,
    Item,
    Reference,
    items_of,
    references,
)

_START = "start"
_WHOLE = "%whole"


def lark_grammar(text: str, effort: Effort) -> Grammar:
    """Raises ConstraintError with line and column where the text is not Lark, or not supported."""
    grammar = read_lark(text, effort)
    if _START not in grammar.rules:
        raise ConstraintError(f"the grammar has no rule {_START!r} to start with")
    _check_names(grammar, effort)
    terminals, ignored = terminal_expressions(grammar, effort)
    rules = without_templates(grammar, effort)
    space = spacing(ignored, _used(rules, terminals), effort)
    spaced = _Spaced(terminals, space, grammar, effort)
    rules = {name: spaced.body(body) for name, body in rules.items()}
    rules[_WHOLE] = ((Reference(_START, 0), space.at_end()),)
    schemas = _schema_grammars(grammar, effort)
    return to_grammar(rules, _WHOLE, effort, has_lexemes=True, grammars=schemas)


def _used(rules: Mapping[str, Body], terminals: Mapping[str, Expression]) -> set[Expression]:
    """The terminals that rules refer to or contain."""
    used: set[Expression] = set()
    for body in rules.values():
        for item in items_of(body):
            if isinstance(item, Reference) and item.name in terminals:
                used.add(terminals[item.name])
            elif not isinstance(item, Reference | Group | Intersection | Complement):
                used.add(item)
    return used


def _schema_grammars(grammar: LarkGrammar, effort: Effort) -> dict[str, Grammar]:
    grammars: dict[str, Grammar] = {}
    for name, (schema, position) in grammar.schemas.items():
        try:
            grammars[name] = schema_grammar(schema, SchemaOptions(), effort)
        except ConstraintTooComplex:
            raise
        except ConstraintError as error:
            raise grammar.source.error(f"in the JSON schema: {error}", position) from None
    return grammars


def _check_names(grammar: LarkGrammar, effort: Effort) -> None:
    known = (
        grammar.rules.keys() | grammar.templates.keys() | grammar.terminals.keys() | grammar.schemas.keys()
    )
    bodies = [(body, ()) for body in (*grammar.rules.values(), *grammar.terminals.values(), *grammar.ignored)]
    for body, parameters in [*bodies, *((t.body, t.parameters) for t in grammar.templates.values())]:
        for reference in references(body):
            effort.spend()
            if reference.name not in known and reference.name not in parameters:
                kind = "terminal" if reference.name.isupper() else "rule"
                raise grammar.source.error(f"{kind} {reference.name!r} is not defined", reference.position)


@dataclass(frozen=True, slots=True)
class _Spaced:
    """Puts terminals in the place of their names, and ignored text before each."""

    terminals: dict[str, Expression]
    spacing: Spacing
    grammar: LarkGrammar
    effort: Effort

    def body(self, body: Body) -> Body:
        options: list[tuple[Item, ...]] = []
        for option in united_words(body):
            items: list[Item] = []
            for item in option:
                self.effort.spend()
                items.extend(self._items(item))
            options.append(tuple(items))
        return tuple(options)

    def _items(self, item: Item) -> tuple[Item, ...]:
        match item:
            case Group(options, low, high):
                return (Group(self.body(options), low, high),)
            case Reference(name) if name in self.terminals:
                return self.spacing.before(self.terminals[name])
            case Reference(name) if name in self.grammar.schemas:
                return (self.spacing.run, item)
            case Reference():
                return (item,)
        assert not isinstance(item, Intersection | Complement)
        return self.spacing.before(item)
