"""Does an expression match one given string? By sets of positions, without building an automaton."""

from cadenza.decoding.constraints.automata.expression import (
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
)
from cadenza.decoding.constraints.limits import Effort


def matches(expression: Expression, text: str, effort: Effort) -> bool:
    return len(text) in _Matcher(text, effort).ends(expression, frozenset({0}))


class _Matcher:
    def __init__(self, text: str, effort: Effort) -> None:
        self.text = text
        self.effort = effort

    def ends(self, expression: Expression, starts: frozenset[int]) -> frozenset[int]:
        """Where matches that begin at any of `starts` may end."""
        self.effort.spend(1 + len(starts) // 8)
        text = self.text
        match expression:
            case Literal(wanted):
                return frozenset(i + len(wanted) for i in starts if text.startswith(wanted, i))
            case CharSet():
                return frozenset(
                    i + 1 for i in starts if i < len(text) and _contains(expression, ord(text[i]))
                )
            case Concat(parts):
                for part in parts:
                    starts = self.ends(part, starts)
                return starts
            case Alternation(options):
                return frozenset().union(*(self.ends(option, starts) for option in options))
            case And(parts):
                return frozenset().union(*(self._all(parts, i) for i in starts))
            case Not(body):
                return frozenset().union(*(self._none(body, i) for i in starts))
            case _:
                return self._repeated(expression.body, expression.min, expression.max, starts)

    def _all(self, parts: tuple[Expression, ...], start: int) -> frozenset[int]:
        found = self.ends(parts[0], frozenset({start}))
        for part in parts[1:]:
            found &= self.ends(part, frozenset({start}))
        return found

    def _none(self, body: Expression, start: int) -> frozenset[int]:
        return frozenset(range(start, len(self.text) + 1)) - self.ends(body, frozenset({start}))

    def _repeated(
        self, body: Expression, low: int, high: int | None, starts: frozenset[int]
    ) -> frozenset[int]:
        """Once the counted rounds bring nothing new they never will: sets of positions are finite."""
        reached = starts
        for _ in range(low):
            following = self.ends(body, reached)
            if following == reached:
                break
            reached = following
            if not reached:
                return reached
        result, rounds = reached, low
        while reached and (high is None or rounds < high):
            reached = self.ends(body, reached) - result
            result |= reached
            rounds += 1
        return result


def _contains(characters: CharSet, code: int) -> bool:
    return any(first <= code <= last for first, last in characters.ranges)
