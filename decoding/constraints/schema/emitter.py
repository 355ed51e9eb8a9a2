"""From shapes to the rules of a grammar: one rule for each thing that is asked of a value."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from cadenza.decoding.constraints.automata.expression import Alternation, Expression, Literal, either
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.grammar.grammar import GrammarBuilder, Production, Symbol
from cadenza.decoding.constraints.limits import Effort
from cadenza.decoding.constraints.schema.array_rules import ArrayRules
from cadenza.decoding.constraints.schema.formula import Formula
from cadenza.decoding.constraints.schema.number_rules import number_symbols
from cadenza.decoding.constraints.schema.object_rules import ObjectRules
from cadenza.decoding.constraints.schema.options import SchemaOptions
from cadenza.decoding.constraints.schema.punctuation import punctuation
from cadenza.decoding.constraints.schema.reader import Reader
from cadenza.decoding.constraints.schema.shape import Shape
from cadenza.decoding.constraints.schema.string_rules import string_symbols


class Emitter:
    """Formulas are expanded when a rule first needs them, and each once, so recursion ends."""

    def __init__(self, reader: Reader, options: SchemaOptions, effort: Effort) -> None:
        self.reader = reader
        self.effort = effort
        self.builder = GrammarBuilder(effort)
        self.punctuation = punctuation(options.whitespace, effort)
        self._symbols: dict[Formula, Symbol] = {}
        self._waiting: deque[tuple[str, Formula, Shape]] = deque()

    def grammar_rules(self, start: Formula) -> str:
        name = self.builder.sequence(self.value(start), hint="start")
        while self._waiting:
            rule, formula, shape = self._waiting.popleft()
            with self._placed(formula):
                self.builder.add(rule, self._productions(shape))
        return name

    def value(self, formula: Formula) -> Symbol:
        """What derives the JSON texts of the values that satisfy the formula."""
        if formula not in self._symbols:
            with self._placed(formula):
                shape = self.reader.emptiness.prune(self.reader.shape(formula))
                self._symbols[formula] = self._symbol(formula, shape)
        return self._symbols[formula]

    @contextmanager
    def _placed(self, formula: Formula) -> Iterator[None]:
        """Say in errors without a place which schema they come from."""
        try:
            yield
        except ConstraintError as error:
            if error.where is not None or not formula:
                raise
            where = self.reader.document.nodes[min(formula)[0]].where
            raise type(error)(str(error), where) from None

    def _symbol(self, formula: Formula, shape: Shape) -> Symbol:
        if not shape.arrays and not shape.objects:
            scalars = self._scalars(shape)
            if len(scalars) == 1:
                return scalars[0]
        name = self.builder.fresh("value")
        self._waiting.append((name, formula, shape))
        return name

    def _productions(self, shape: Shape) -> list[Production]:
        productions: list[Production] = [(scalar,) for scalar in self._scalars(shape)]
        for array in shape.arrays:
            productions.extend(ArrayRules(array, self).productions())
        for part in shape.objects:
            productions.extend(ObjectRules(part, self).productions())
        return productions

    def _scalars(self, shape: Shape) -> list[Symbol]:
        words: list[Expression] = [Literal("null")] if shape.null else []
        words.extend(
            Literal(word) for word, value in (("true", True), ("false", False)) if value in shape.booleans
        )
        strings = string_symbols(shape.strings, self.builder, self.effort)
        numbers = number_symbols(shape.numbers, self.builder, self.reader.emptiness.no_text, self.effort)
        symbols = [*strings, *numbers]
        if words:
            symbols.insert(0, either(*words))
        return symbols if symbols else ([] if shape.arrays or shape.objects else [Alternation(())])
