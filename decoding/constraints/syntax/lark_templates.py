"""Templates of a Lark grammar, `_list{item, ","}`, written out as rules: one for each different use."""

from dataclasses import dataclass, field
from typing import TypeAlias

from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.syntax.lark_reader import LarkGrammar
from cadenza.decoding.constraints.syntax.rules import Body, Group, Item, Reference

_Key: TypeAlias = tuple[object, ...]


def without_templates(grammar: LarkGrammar, effort: Effort) -> dict[str, Body]:
    """All rules and the templates that they use. Raises ConstraintError where arguments do not fit."""
    return _Expansion(grammar, effort).rules_of_grammar()


@dataclass(slots=True)
class _Expansion:
    grammar: LarkGrammar
    effort: Effort
    _names: dict[_Key, str] = field(default_factory=dict)
    """Of the rules for uses of templates."""
    _pending: list[tuple[str, str, tuple[Item, ...]]] = field(default_factory=list)

    def rules_of_grammar(self) -> dict[str, Body]:
        rules = {name: self._body(body, {}) for name, body in self.grammar.rules.items()}
        while self._pending:
            name, template, arguments = self._pending.pop()
            definition = self.grammar.templates[template]
            rules[name] = self._body(
                definition.body, dict(zip(definition.parameters, arguments, strict=True))
            )
            self.effort.check_rules(len(rules))
        return rules

    def _body(self, body: Body, arguments: dict[str, Item]) -> Body:
        options: list[tuple[Item, ...]] = []
        for option in body:
            items: list[Item] = []
            for item in option:
                self.effort.spend()
                items.append(self._item(item, arguments))
            options.append(tuple(items))
        return tuple(options)

    def _item(self, item: Item, arguments: dict[str, Item]) -> Item:
        if isinstance(item, Group):
            return Group(self._body(item.options, arguments), item.low, item.high)
        if not isinstance(item, Reference):
            return item
        if item.arguments:
            return self._use(item, arguments)
        found = arguments.get(item.name, item)
        if isinstance(found, Reference) and found.name in self.grammar.templates:
            raise self.grammar.source.error(f"template {found.name!r} needs its arguments", item.position)
        return found

    def _argument(self, item: Item, arguments: dict[str, Item]) -> Item:
        """A template may be an argument, to be used by the template that gets it."""
        if isinstance(item, Reference) and not item.arguments:
            return arguments.get(item.name, item)
        return self._item(item, arguments)

    def _use(self, use: Reference, arguments: dict[str, Item]) -> Reference:
        called = arguments.get(use.name, use)
        name = called.name if isinstance(called, Reference) else use.name
        template = self.grammar.templates.get(name)
        if template is None:
            raise self.grammar.source.error(f"template {name!r} is not defined", use.position)
        given = tuple([self._argument(argument, arguments) for argument in use.arguments])
        if len(given) != len(template.parameters):
            raise self.grammar.source.error(
                f"template {name!r} takes {len(template.parameters)} arguments, not {len(given)}",
                use.position,
            )
        key = (name, *(item.name if isinstance(item, Reference) else item for item in given))
        if key not in self._names:
            self._names[key] = f"{name}{{{len(self._names)}}}"
            self._pending.append((self._names[key], name, given))
        return Reference(self._names[key], use.position)
