"""What compiling a constraint yields. It crosses from the worker process to the engine's."""

from dataclasses import dataclass
from typing import TypeAlias

from cadenza.decoding.constraints.grammar.compiled import CompiledGrammar
from cadenza.decoding.constraints.token_automaton import FiniteAutomaton


@dataclass(frozen=True, slots=True)
class CompiledFinite:
    """A regular expression or a choice: an exact automaton over tokens."""

    automaton: FiniteAutomaton
    min_tokens: int
    """Fewest tokens of a complete answer."""


@dataclass(frozen=True, slots=True)
class CompiledContextFree:
    """Anything else: the grammar for our parser, and the same one as text for llguidance."""

    grammar: CompiledGrammar
    text: str
    min_tokens: int
    """Tokens of a shortest complete answer, counted in bytes."""
    spells_completions: bool
    """Each byte of any shortest completion is a token: none needs more tokens than it has bytes."""


Compiled: TypeAlias = CompiledFinite | CompiledContextFree
