"""Expressions to minimal automata over bytes.

An automaton over classes of characters first (see `char_classes`), minimal after each operator that needs a
deterministic operand, then one over UTF-8. Complement is relative to all texts of characters, so that only valid
UTF-8 is ever accepted.
"""

from collections import OrderedDict
from collections.abc import Iterator

from cadenza.decoding.constraints.automata.char_classes import CharClasses
from cadenza.decoding.constraints.automata.char_dfa import (
    CharDFA,
    check_unfinished,
    complement,
    intersection,
)
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.expression import (
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
)
from cadenza.decoding.constraints.automata.minimize import minimize
from cadenza.decoding.constraints.automata.nfa import NFA, determinize
from cadenza.decoding.constraints.automata.relations import intersects, is_subset
from cadenza.decoding.constraints.automata.utf8 import to_bytes
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort

__all__ = ["intersects", "is_subset", "to_dfa"]


_MAX_KEPT_BYTES = 32 * 1024 * 1024


class _Kept:
    """The last automata that were built, by the identity of their expressions, which the entries keep alive."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, tuple[Expression, DFA]] = OrderedDict()
        self._num_bytes = 0

    def get(self, expression: Expression) -> DFA | None:
        entry = self._entries.get(id(expression))
        if entry is None:
            return None
        self._entries.move_to_end(id(expression))
        return entry[1]

    def put(self, expression: Expression, dfa: DFA) -> None:
        self._entries[id(expression)] = expression, dfa
        self._num_bytes += dfa.num_bytes
        while self._num_bytes > _MAX_KEPT_BYTES:
            _, (_, oldest) = self._entries.popitem(last=False)
            self._num_bytes -= oldest.num_bytes


_kept = _Kept()


def to_dfa(expression: Expression, effort: Effort) -> DFA:
    """The minimal automaton of the expression's language, without states if that is empty.

    The last ones are kept: one compilation asks for a terminal several times, and schemas share theirs. By identity,
    as comparing expressions that share parts can take exponential time.
    """
    dfa = _kept.get(expression)
    if dfa is None:
        dfa = _built(expression, effort)
        _kept.put(expression, dfa)
    return dfa


def _built(expression: Expression, effort: Effort) -> DFA:
    char_sets: set[CharSet] = set()
    characters: set[str] = set()
    shared: set[int] = set()
    for part in _walk(expression, shared, effort):
        if isinstance(part, CharSet):
            char_sets.add(part)
        elif isinstance(part, Literal):
            characters.update(part.text)
    if any("\ud800" <= character <= "\udfff" for character in characters):
        raise ConstraintError("a surrogate is not a character that text can contain")
    classes = CharClasses(char_sets, characters, effort)
    dfa = _Builder(classes, shared, effort).dfa(expression)
    effort.check_states(len(dfa.rows))
    return to_bytes(dfa, classes, effort)


def _walk(expression: Expression, shared: set[int], effort: Effort) -> Iterator[Expression]:
    """Every part once; collects those that are met again."""
    pending = [expression]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            shared.add(id(part))
            continue
        seen.add(id(part))
        effort.spend()
        yield part
        pending.extend(_operands(part))


def _operands(expression: Expression) -> tuple[Expression, ...]:
    match expression:
        case Concat(parts) | Alternation(parts) | And(parts):
            return parts
        case Repeat(body, _, _) | Not(body):
            return (body,)
        case _:
            return ()


class _Builder:
    """Automata of the parts of one expression, each part compiled once."""

    def __init__(self, classes: CharClasses, shared: set[int], effort: Effort) -> None:
        self._classes = classes
        self._shared = shared
        self._effort = effort
        self._known: dict[int, CharDFA] = {}
        self._depth = 0

    def dfa(self, expression: Expression) -> CharDFA:
        known = self._known.get(id(expression))
        if known is not None:
            return known
        self._depth += 1
        self._effort.check_nesting(self._depth)
        match expression:
            case And(parts):
                dfa = intersection([self.dfa(part) for part in parts], self._effort)
            case Not(body):
                dfa = complement(self.dfa(body), self._classes.count, self._effort)
            case _:
                dfa = self._determinized(expression)
        self._depth -= 1
        result = self._known[id(expression)] = minimize(dfa, self._effort)
        return result

    def _determinized(self, expression: Expression) -> CharDFA:
        nfa = NFA(self._effort)
        start, end = nfa.state(), nfa.state()
        pending = [(expression, start, end)]
        known: dict[tuple[int, int], int] = {}
        while pending:
            part, before, after = pending.pop()
            if id(part) in self._shared and isinstance(part, Concat | Alternation):
                if (id(part), after) in known:
                    nfa.skip(before, known[id(part), after])
                    continue
                known[id(part), after] = own = nfa.state()
                nfa.skip(before, own)
                before = own
            pending.extend(self._connect(nfa, part, before, after))
        return determinize(nfa, start, end)

    def _connect(
        self, nfa: NFA, expression: Expression, start: int, end: int
    ) -> list[tuple[Expression, int, int]]:
        """Ways from start to end for what the expression matches; answers which parts are still to connect.

        Nothing comes back into `start` nor leaves `end` on the expression's account, so both may be shared.
        """
        match expression:
            case Literal(text):
                nfa.words([self._word(text)], start, end)
            case CharSet():
                nfa.connect(start, self._classes.of(expression), end)
            case Concat(parts):
                inner = [nfa.state() for _ in parts[1:]]
                if not parts:
                    nfa.skip(start, end)
                return list(zip(parts, [start, *inner], [*inner, end], strict=True)) if parts else []
            case Alternation(options):
                words = [option.text for option in options if isinstance(option, Literal)]
                nfa.words(map(self._word, words), start, end)
                return [(option, start, end) for option in options if not isinstance(option, Literal)]
            case Repeat(body, low, high):
                return self._repeat(nfa, body, low, high, start, end)
            case And() | Not():
                nfa.embed(self.dfa(expression), start, end)
        return []

    def _word(self, text: str) -> Iterator[int]:
        return (self._classes.of_char(character)[0] for character in text)

    def _repeat(
        self, nfa: NFA, body: Expression, low: int, high: int | None, start: int, end: int
    ) -> list[tuple[Expression, int, int]]:
        """A chain of copies: `low` that must be, then either optional ones or a loop."""
        if high is not None and high < low:
            return []
        simple = isinstance(body, CharSet | Literal) or max(low, high or 0) <= 1
        automaton = None if simple else self.dfa(body)
        nullable = automaton is not None and bool(automaton.rows) and automaton.accepting[0]
        if nullable:
            low = 0
        size = 1 if automaton is None else len(automaton.rows)
        check_unfinished(max(low, high or 0) * max(1, size), self._effort)
        pieces: list[tuple[int, int]] = []
        here = start
        for _ in range(low):
            following = nfa.state()
            pieces.append((here, following))
            here = following
        if high is None:
            loop = nfa.state()
            nfa.skip(here, loop)
            nfa.skip(loop, end)
            pieces.append((loop, loop))
        else:
            for _ in range(high - low):
                nfa.skip(here, end)
                following = nfa.state()
                pieces.append((here, following))
                here = following
            nfa.skip(here, end)
        if automaton is None:
            return [(body, *ends) for ends in pieces]
        for ends in pieces:
            nfa.embed(automaton, *ends, without_empty=nullable)
        return []
