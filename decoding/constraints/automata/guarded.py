"""Repetitions whose every character has lookaheads beside it, such as (?:(?!-->).)*, to expressions.

Exact where what follows the repetition has one length, for then it is known where in the text it ends, and a
lookahead at each of its places is a condition on every suffix that begins before. Otherwise refused by name.
"""

from collections.abc import Iterable

from cadenza.decoding.constraints.automata.expression import (
    ANY_CHAR,
    ANY_TEXT,
    EPSILON,
    Alternation,
    And,
    CharSet,
    Concat,
    Expression,
    Literal,
    Not,
    Repeat,
    either,
)


def loop_then(
    loop: Repeat, ahead_before: Iterable[Expression], ahead_after: Iterable[Expression], rest: Expression
) -> Expression | None:
    """The loop with, before and after each character, what the text must go on with, and the rest of the pattern.

    None: the rest has no known length.
    """
    before, after = list(ahead_before), list(ahead_after)
    options = []
    for option in _options(rest):
        length = fixed_length(option)
        if length is None:
            return None
        parts: list[Expression] = [Concat((loop, option))]
        parts += [Not(Concat((ANY_TEXT, And((Not(ahead), _longer(length + 1)))))) for ahead in before]
        parts += [Not(Concat((ANY_CHAR, ANY_TEXT, And((Not(ahead), _longer(length)))))) for ahead in after]
        options.append(And(tuple(parts)))
    return either(*options)


def _options(rest: Expression) -> tuple[Expression, ...]:
    match rest:
        case Alternation(options) if options:
            return options
        case Repeat(body, 0, 1):
            return EPSILON, body
        case Concat((*first, Repeat(body, 0, 1))):
            return Concat(tuple(first)), Concat((*first, body))
    return (rest,)


def _longer(length: int) -> Expression:
    return Repeat(ANY_CHAR, length, None)


def fixed_length(part: Expression) -> int | None:
    """The number of characters of all of its strings, if it is the same."""
    match part:
        case Literal(text):
            return len(text)
        case CharSet():
            return 1
        case Concat(parts):
            lengths = [fixed_length(each) for each in parts]
            known = [length for length in lengths if length is not None]
            return sum(known) if len(known) == len(lengths) else None
        case Alternation(options):
            found = {fixed_length(option) for option in options}
            return found.pop() if len(found) == 1 else None
        case Repeat(body, low, high) if low == high:
            length = fixed_length(body)
            return None if length is None else low * length
        case And(parts):
            return next((length for each in parts if (length := fixed_length(each)) is not None), None)
    return None
