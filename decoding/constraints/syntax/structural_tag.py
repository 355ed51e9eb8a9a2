"""Structural tags to a Grammar: free text with structured parts in it, as xgrammar, vLLM and SGLang ask for them.

Free text ends where a trigger, or the end of the tag around it, is complete for the first time; after a trigger one
of the tags that begin with it must follow. What counts tokens instead of characters is refused by name.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    Concat,
    Expression,
    Literal,
    concat,
    either,
)
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError, ConstraintTooComplex
from cadenza.decoding.constraints.grammar.grammar import Grammar, GrammarBuilder, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema import SchemaOptions, schema_grammar
from cadenza.decoding.constraints.syntax.fields import Fields
from cadenza.decoding.constraints.syntax.free_text import until, without
from cadenza.decoding.constraints.syntax.lowering import add_grammar
from cadenza.decoding.constraints.syntax.tag_fields import (
    check_reachable,
    end_strings,
    marker,
    modern,
    only_trigger,
)
from cadenza.decoding.constraints.syntax.text import grammar_from_text


def structural_tag_grammar(value: Any, effort: Effort, schema_options: SchemaOptions) -> Grammar:
    """Of `{"type": "structural_tag", "format": {...}}`, or with `structures` and `triggers`, the older form.

    Raises ConstraintError with a JSON pointer to what is malformed or not supported.
    """
    fields = Fields(value, "#")
    if fields.text("type") != "structural_tag":
        raise fields.error('"structural_tag" is expected', "type")
    tags = _Tags(GrammarBuilder(effort), effort, schema_options)
    if fields.has("structures"):
        symbol = tags.of_format(modern(fields), "#", _Context())
    else:
        format_ = fields.any("format")
        fields.finish()
        symbol = tags.of_format(format_, "#/format", _Context())
    return tags.builder.build(symbol)


@dataclass(frozen=True, slots=True)
class _Context:
    """What is around a format."""

    stops: tuple[str, ...] = ()
    """Ends of the tag around it: free text contains none of them."""
    closes: bool = False
    """Whether the format is the last thing before them, and one of them is to be written with it."""
    depth: int = 0

    @property
    def inner(self) -> "_Context":
        return _Context(self.stops, False, self.depth + 1)

    @property
    def last(self) -> "_Context":
        return _Context(self.stops, self.closes, self.depth + 1)


@dataclass(slots=True)
class _Tags:
    builder: GrammarBuilder
    effort: Effort
    options: SchemaOptions
    _schemas: dict[str, str] = field(default_factory=dict)
    """Rules for schemas that were asked for already: tools often share one."""

    def of_format(self, value: Any, path: str, context: _Context) -> Symbol:
        self.effort.spend()
        self.effort.check_nesting(context.depth)
        fields = Fields(value, path)
        kind = fields.text("type")
        if kind in _OPEN:
            symbol = _OPEN[kind](self, fields, context)
            fields.finish()
            return symbol
        if kind not in _PLAIN:
            supported = ", ".join(sorted([*_PLAIN, *_OPEN]))
            raise fields.error(f"the format type {kind!r} is not supported; these are: {supported}", "type")
        symbol = _PLAIN[kind](self, fields, context.inner)
        fields.finish()
        return self._then(symbol, _ends(context)) if context.closes else symbol

    # Formats that have an end of their own.

    def _const_string(self, fields: Fields, context: _Context) -> Symbol:
        return Literal(fields.text("value"))

    def _json_schema(self, fields: Fields, context: _Context) -> Symbol:
        schema = fields.any("json_schema")
        if fields.has("style") and fields.text("style") != "json":
            raise fields.error(f"the style {fields.text('style')!r} is not supported", "style")
        if fields.flag("any_order"):
            raise fields.error("members in any order are not supported", "any_order")
        return self._shared(f"schema {json.dumps(schema)}", lambda: self._schema(schema, fields))

    def _schema(self, schema: Any, fields: Fields) -> Grammar:
        path = f"{fields.path}/json_schema"
        try:
            return schema_grammar(schema, self.options, self.effort)
        except ConstraintTooComplex:
            raise
        except ConstraintError as error:
            inner = (error.where or "").removeprefix("#")
            raise ConstraintError(error.message, f"{path}{inner}") from None

    def _shared(self, key: str, make: Callable[[], Grammar]) -> str:
        if key not in self._schemas:
            grammar = make()
            self._schemas[key] = add_grammar(self.builder, grammar, f"part{len(self._schemas)}")
        return self._schemas[key]

    def _grammar(self, fields: Fields, context: _Context) -> Symbol:
        text = fields.text("grammar")
        try:
            return self._shared(f"grammar {text}", lambda: grammar_from_text(text, self.effort))
        except ConstraintTooComplex:
            raise
        except ConstraintError as error:
            raise fields.error(str(error), "grammar") from None

    def _regex(self, fields: Fields, context: _Context) -> Symbol:
        try:
            return parse_regex(fields.text("pattern"), "python", self.effort)
        except ConstraintTooComplex:
            raise
        except ConstraintError as error:
            raise fields.error(str(error), "pattern") from None

    def _repetition(self, fields: Fields, context: _Context) -> Symbol:
        low, high = {"star": (0, None), "plus": (1, None), "optional": (0, 1)}[fields.text("type")]
        return self.builder.repeat(self._content(fields, context), low, high)

    def _repeat(self, fields: Fields, context: _Context) -> Symbol:
        low, high = fields.integer("min"), fields.integer("max")
        if low < 0 or (high < low and high != -1):
            raise fields.error("`min` is at least 0, and `max` at least `min`, or -1 for no bound")
        return self.builder.repeat(self._content(fields, context), low, None if high == -1 else high)

    def _content(self, fields: Fields, context: _Context) -> Symbol:
        return self.of_format(fields.any("content"), f"{fields.path}/content", context)

    def _tag(self, fields: Fields, context: _Context) -> Symbol:
        begin = marker(fields, "begin")
        return self._then(Literal(begin), self._after_begin(fields, context))

    def _after_begin(self, fields: Fields, context: _Context) -> Symbol:
        ends = end_strings(fields)
        stops = tuple(end for end in ends if end)
        content, path = fields.any("content"), f"{fields.path}/content"
        closed = _Context(stops, True, context.depth)
        if "" not in ends:
            return self.of_format(content, path, closed)
        unmarked = self.of_format(content, path, _Context(stops + context.stops, False, context.depth))
        if not stops:
            return unmarked
        return self.builder.choice([(unmarked,), (self.of_format(content, path, closed),)])

    def _tags_with_separator(self, fields: Fields, context: _Context) -> Symbol:
        separator = fields.text("separator")
        tags = [
            (self._then(Literal(begin), self._after_begin(tag, context)),)
            for begin, tag in self._each_tag(fields)
        ]
        low = 1 if fields.flag("at_least_one") else 0
        high = 1 if fields.flag("stop_after_first") else None
        between = Literal(separator) if separator else None
        return self.builder.repeat(self.builder.choice(tags, "tag"), low, high, between)

    def _each_tag(self, fields: Fields) -> list[tuple[str, Fields]]:
        tags = []
        for number, value in enumerate(fields.list("tags")):
            tag = Fields(value, f"{fields.path}/tags/{number}")
            if tag.has("type") and tag.text("type") != "tag":
                raise tag.error('"tag" is expected', "type")
            tags.append((marker(tag, "begin"), tag))
            for name in ("content", "end"):
                tag.any(name)
            tag.finish()
        if not tags:
            raise fields.error("at least one tag is needed", "tags")
        return tags

    # Formats that may end in free text, so that what closes the tag around them concerns them.

    def _sequence(self, fields: Fields, context: _Context) -> Symbol:
        elements = self._elements(fields)
        symbols = [self.of_format(value, path, context.inner) for value, path in elements[:-1]]
        value, path = elements[-1]
        return self._then(*symbols, self.of_format(value, path, context.last))

    def _or(self, fields: Fields, context: _Context) -> Symbol:
        options = [self.of_format(value, path, context.last) for value, path in self._elements(fields)]
        return self.builder.choice([(option,) for option in options], "or")

    def _elements(self, fields: Fields) -> list[tuple[Any, str]]:
        elements = fields.list("elements")
        if not elements:
            raise fields.error("at least one element is needed", "elements")
        return [(value, f"{fields.path}/elements/{number}") for number, value in enumerate(elements)]

    def _any_text(self, fields: Fields, context: _Context) -> Symbol:
        excluded = fields.texts("excludes")
        max_chars = fields.integer("max_chars") if fields.is_given("max_chars") else None
        if max_chars is not None and max_chars < 0:
            raise fields.error("the number is negative", "max_chars")
        if fields.is_given("max_tokens"):
            raise fields.error("a limit in tokens is not supported; `max_chars` is", "max_tokens")
        if context.closes:
            stops = context.stops
            return either(*[until(stop, stops, excluded, max_chars) for stop in stops])
        return without([*excluded, *context.stops], max_chars)

    def _triggered_tags(self, fields: Fields, context: _Context) -> Symbol:
        triggers, tags = fields.texts("triggers"), self._each_tag(fields)
        following: dict[str, list[Symbol]] = {trigger: [] for trigger in triggers}
        rests = [(begin, self._after_begin(tag, context.inner)) for begin, tag in tags]
        for (begin, tag), (_, rest) in zip(tags, rests, strict=True):
            trigger = only_trigger(begin, triggers, tag)
            following[trigger].append(self._then(Literal(begin[len(trigger) :]), rest))
        unused = next((trigger for trigger, parts in following.items() if not parts), None)
        if unused is not None:
            raise fields.error(f"no tag begins with the trigger {unused!r}", "triggers")
        once, excluded = fields.flag("stop_after_first"), fields.texts("excludes")
        end: Symbol = _ends(context) if context.closes else EPSILON
        if not fields.flag("at_least_one"):
            return self._text_with_triggers(following, not once, excluded, fields, context)
        first = self.builder.choice([(self._then(Literal(begin), rest),) for begin, rest in rests], "tag")
        if once:
            return self._then(first, end)
        return self._then(first, self._text_with_triggers(following, True, excluded, fields, context))

    def _dispatch(self, fields: Fields, context: _Context) -> Symbol:
        following: dict[str, list[Symbol]] = {}
        for number, rule in enumerate(fields.list("rules")):
            path = f"{fields.path}/rules/{number}"
            if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) and rule[0]):
                raise ConstraintError("a rule is a list of a string, not empty, and a format", path)
            following.setdefault(rule[0], []).append(self.of_format(rule[1], f"{path}/1", context.inner))
        if not following:
            raise fields.error("at least one rule is needed", "rules")
        is_repeated, excluded = fields.flag("loop", True), fields.texts("excludes")
        return self._text_with_triggers(following, is_repeated, excluded, fields, context)

    def _text_with_triggers(
        self,
        following: Mapping[str, Sequence[Symbol]],
        is_repeated: bool,
        excluded: Sequence[str],
        fields: Fields,
        context: _Context,
    ) -> Symbol:
        """Free text in which each trigger is followed by one of its symbols, then free text again or the end."""
        markers = [*following, *context.stops]
        check_reachable(markers, fields)
        text = self.builder.fresh("text")
        end: Symbol = _ends(context) if context.closes else EPSILON
        options: list[tuple[Symbol, ...]] = []
        for trigger, symbols in following.items():
            content = self.builder.choice([(symbol,) for symbol in symbols], "content")
            options.append((until(trigger, markers, excluded), content, text if is_repeated else end))
        if context.closes:
            options += [(until(stop, markers, excluded),) for stop in context.stops]
        else:
            options.append((without([*markers, *excluded]),))
        return self.builder.add(text, options)

    def _then(self, *symbols: Symbol) -> Symbol:
        """One after another; neighbouring expressions become one."""
        production: list[Symbol] = []
        for symbol in symbols:
            if symbol == EPSILON:
                continue
            last = production[-1] if production else None
            if last is not None and not isinstance(symbol, str) and not isinstance(last, str):
                production[-1] = concat(*_parts(last), *_parts(symbol))
            else:
                production.append(symbol)
        if not production:
            return EPSILON
        return production[0] if len(production) == 1 else self.builder.sequence(*production)


_Maker = Callable[[_Tags, Fields, _Context], Symbol]
_PLAIN: dict[str, _Maker] = {
    "const_string": _Tags._const_string,
    "json_schema": _Tags._json_schema,
    "grammar": _Tags._grammar,
    "regex": _Tags._regex,
    "optional": _Tags._repetition,
    "star": _Tags._repetition,
    "plus": _Tags._repetition,
    "repeat": _Tags._repeat,
    "tag": _Tags._tag,
    "tags_with_separator": _Tags._tags_with_separator,
}
_OPEN: dict[str, _Maker] = {
    "sequence": _Tags._sequence,
    "or": _Tags._or,
    "any_text": _Tags._any_text,
    "triggered_tags": _Tags._triggered_tags,
    "dispatch": _Tags._dispatch,
}


def _ends(context: _Context) -> Expression:
    return either(*[Literal(stop) for stop in context.stops])


def _parts(expression: Expression) -> tuple[Expression, ...]:
    return expression.parts if isinstance(expression, Concat) else (expression,)
