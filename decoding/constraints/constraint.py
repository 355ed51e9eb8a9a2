"""A compiled constraint as requests hold it: immutable, shared, and the maker of matchers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cadenza.decoding.constraints.compiled import Compiled, CompiledFinite
from cadenza.decoding.constraints.finite import FiniteMatcher
from cadenza.decoding.constraints.grammar.parser import Parser
from cadenza.decoding.constraints.grammar_masks import GrammarMasks
from cadenza.decoding.constraints.llguidance_masks import MaskMatcher, MaskTables
from cadenza.decoding.constraints.matcher import GrammarMatcher, Matcher
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.vocabulary import Vocabulary

Encode = Callable[[bytes], list[int] | None]
"""The model's own tokenization of some text, None where it has none."""


@dataclass(frozen=True)
class TokenTables:
    """What all constraints of one model share."""

    vocabulary: Vocabulary
    encode: Encode

    def prepared(self) -> "TokenTables":
        """The same, with everything made that would otherwise be made when first needed."""
        self.vocabulary.prepare()
        _ = self.vocabulary.in_order, self.masks  # for masks: the process that compiles makes none
        return self

    @cached_property
    def masks(self) -> MaskTables | None:
        """None for a model without a token that ends an answer: it has finite constraints only."""
        return MaskTables(self.vocabulary) if self.vocabulary.eos_ids else None


@dataclass(frozen=True, eq=False)
class Constraint:
    spec: ConstraintSpec
    compiled: Compiled
    tables: TokenTables
    num_bytes: int
    """Its size, as a cache counts it."""

    @property
    def min_tokens(self) -> int:
        """A request must allow at least so many: the constraint can then be satisfied, whatever happens."""
        return self.compiled.min_tokens

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        tables, compiled = self.tables, self.compiled
        if isinstance(compiled, CompiledFinite):
            return FiniteMatcher(compiled.automaton, tables.vocabulary, tables.encode)
        text, masks = compiled.text, tables.masks
        assert masks is not None
        return GrammarMatcher(
            Parser(compiled.grammar),
            tables.vocabulary,
            compiled.spells_completions,
            GrammarMasks(tables.vocabulary, lambda: MaskMatcher.build(text, masks)),
            tables.encode,
        )
