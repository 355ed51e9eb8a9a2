"""Patterns in Python's or ECMAScript's syntax to expressions.

The expression denotes exactly the texts that match, with one addition: where Python and JavaScript disagree, it is
what satisfies both. So \\d, \\w, \\s and case-insensitive letters are the ASCII ones where more characters would
match more, and exclude the Unicode ones, too, where they are negated (\\D, [^\\w], (?!\\s)); a caller that takes the
complement of the result says `negated`.

Laziness changes no language. Refused by name: backreferences, recursion, conditionals, atomic groups, possessive
quantifiers, and assertions inside an unbounded repetition, except lookaheads around a single character where what
follows the repetition has one length, as in <!--(?:(?!-->).)*-->.
"""

import re
from dataclasses import dataclass, field, replace

from cadenza.decoding.constraints.automata.assertions import (
    AT_END,
    AT_START,
    Behind,
    Follows,
    Node,
    Preceded,
    boundary,
    choice,
    guarded,
    is_plain,
    is_zero_width,
    num_assertions,
    sequence,
)
from cadenza.decoding.constraints.automata.expression import (
    EPSILON,
    Alternation,
    CharSet,
    Expression,
    Literal,
    Repeat,
    optional,
)
from cadenza.decoding.constraints.automata.lowering import without_assertions
from cadenza.decoding.constraints.automata.regex_source import (
    Dialect,
    Flags,
    Source,
    read_class,
    read_count,
    read_escape,
)
from cadenza.decoding.constraints.automata.unicode_sets import fold_case
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort

_MAX_ASSERTIONS = 100
_MAX_COPIES = 32
"""Of a group with assertions that a bounded repetition writes out."""
_NEWLINE = CharSet.chars("\n")
_LINE_ENDS = CharSet.chars("\n\r\u2028\u2029")
_VERBOSE_SPACE = " \t\n\r\v\f"
_FLAGS = {"i": "ignore_case", "s": "dot_all", "m": "multiline", "x": "verbose", "a": "ascii_only"}
_GROUPS = (
    # opening, kind; longer ones first
    ("?:", "group"), ("?=", "ahead"), ("?!", "not ahead"), ("?<=", "behind"), ("?<!", "not behind"),
)  # fmt: skip
_REFUSED_GROUPS = (
    ("?>", "an atomic group"), ("?|", "a branch reset"), ("?P=", "a backreference"), ("?P>", "recursion"),
    ("?&", "recursion"), ("?R", "recursion"), ("?(", "a conditional"), ("?P&", "recursion"), ("*", "a control verb"),
)  # fmt: skip
_ORDINARY = re.compile(r"[^\\\[\](){}|.*+?^$#\s\ud800-\udfff]+(?![*+?{])")
"""Characters that stand for themselves, less one that a quantifier follows."""
_NAME = re.compile(r"\?P?<[^\W\d]\w*>")
_INLINE_FLAGS = re.compile(r"\?([a-zA-Z]*)(?:-([a-zA-Z]+))?([:)])")


def parse_regex(
    pattern: str, dialect: Dialect, effort: Effort, *, unanchored: bool = False, negated: bool = False
) -> Expression:
    """What the whole text must match; unanchored: what some part of it must match.

    negated: the caller takes the complement, so that larger is stricter.
    """
    try:
        node = _Parser(Source(pattern, dialect, effort), wide=negated).parse()
        return without_assertions(node, effort, unanchored=unanchored)
    except RecursionError:
        raise ConstraintTooComplex("the pattern is nested too deeply") from None


@dataclass(slots=True)
class _Group:
    """One that is open: what it is, and what was read of it so far."""

    kind: str
    start: int
    flags: Flags
    wide: bool
    nodes: list[Node] = field(default_factory=list)
    options: list[Node] = field(default_factory=list)
    repeatable: bool = False
    """Whether a quantifier may follow."""

    def add(self, node: Node, repeatable: bool = True) -> None:
        self.nodes.append(node)
        self.repeatable = repeatable

    def next_option(self) -> None:
        self.options.append(sequence(self.nodes))
        self.nodes = []
        self.repeatable = False

    def close(self) -> Node:
        self.next_option()
        return choice(self.options)


class _Parser:
    """Groups on a stack of our own, so that depth is a limit and not a crash."""

    def __init__(self, source: Source, *, wide: bool) -> None:
        self._source = source
        self._groups = [_Group("group", 0, Flags(), wide)]
        self._num_assertions = 0

    def parse(self) -> Node:
        while self._source.more:
            self._step(self._groups[-1])
        if len(self._groups) > 1:
            raise self._source.error("the group is not closed", self._groups[-1].start)
        return self._groups[0].close()

    def _step(self, group: _Group) -> None:
        source, start = self._source, self._source.at
        ordinary = None if group.flags.ignore_case else source.match(_ORDINARY)
        if ordinary:
            source.effort.spend(1 + len(ordinary[0]) // 64)
            group.add(Literal(ordinary[0]))
            return
        character = source.next()
        if group.flags.verbose and character in _VERBOSE_SPACE:
            return
        match character:
            case "#" if group.flags.verbose:
                end = source.pattern.find("\n", source.at)
                source.at = len(source.pattern) if end < 0 else end + 1
            case "(":
                self._open(group, start)
            case ")":
                self._close(start)
            case "|":
                group.next_option()
            case "[":
                group.add(read_class(source, group.flags, wide=group.wide))
            case "." | "^" | "$":
                self._special(group, character)
            case "*" | "+" | "?" | "{":
                self._quantifier(group, character, start)
            case "\\":
                self._escape(group, start)
            case _:
                group.add(self._character(group, character))

    def _character(self, group: _Group, character: str) -> Expression:
        if group.flags.ignore_case:
            chars = fold_case(CharSet.chars(character), wide=group.wide)
            if chars != CharSet.chars(character):
                return chars
        return CharSet(()) if "\ud800" <= character <= "\udfff" else Literal(character)

    def _assertion(self, group: _Group, node: Node, repeatable: bool = False) -> None:
        self._count_assertions(1)
        group.add(node, repeatable)

    def _count_assertions(self, number: int) -> None:
        self._num_assertions += number
        if self._num_assertions > _MAX_ASSERTIONS:
            raise ConstraintTooComplex(f"the pattern has more than {_MAX_ASSERTIONS} anchors and lookarounds")

    def _special(self, group: _Group, character: str) -> None:
        flags = group.flags
        if character == ".":
            narrow = self._source.dialect == "ecma" and not group.wide
            excluded = CharSet(()) if flags.dot_all else _LINE_ENDS if narrow else _NEWLINE
            group.add(excluded.complement())
        elif character == "^":
            self._assertion(group, Preceded(_NEWLINE, True, False) if flags.multiline else AT_START)
        elif flags.multiline:
            self._assertion(group, Follows(choice([AT_END, _NEWLINE]), False))
        elif self._source.dialect == "python" or group.wide:
            self._assertion(group, Follows(sequence([optional(_NEWLINE), AT_END]), False))
        else:
            self._assertion(group, AT_END)

    def _escape(self, group: _Group, start: int) -> None:
        source = self._source
        letter = source.pattern[source.at : source.at + 1]
        if letter in ("A", "Z", "z"):
            source.next()
            self._assertion(group, AT_START if letter == "A" else AT_END)
        elif letter in ("b", "B"):
            source.next()
            word_edge = boundary(letter == "B", wide=group.wide, ascii_only=group.flags.ascii_only)
            self._assertion(group, word_edge)
        else:
            found = read_escape(source, group.flags, wide=group.wide, in_class=False)
            if isinstance(found, CharSet):
                group.add(fold_case(found, wide=group.wide) if group.flags.ignore_case else found)
            else:
                group.add(self._character(group, found))

    def _quantifier(self, group: _Group, character: str, start: int) -> None:
        source = self._source
        counts: tuple[int, int | None] | None = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(character)
        if counts is None:
            source.at = start
            counts = read_count(source)
            if counts is None:
                source.at = start + 1
                group.add(Literal("{"))
                return
        if not group.repeatable:
            raise source.error("there is nothing to repeat", start)
        if source.take("+"):
            raise source.refused("a possessive quantifier", start)
        source.take("?")
        group.nodes[-1] = self._repeated(group.nodes[-1], *counts, start)
        group.repeatable = False

    def _repeated(self, node: Node, low: int, high: int | None, start: int) -> Node:
        if high == 0:
            return EPSILON
        if is_plain(node):
            return node if (low, high) == (1, 1) else Repeat(node, low, high)  # type: ignore[arg-type]
        if is_zero_width(node):
            return node if low else EPSILON
        if high is None and (loop := guarded(node, low, start)):
            return loop
        if high is None or high > _MAX_COPIES:
            raise self._source.refused("an assertion inside a repetition", start)
        self._count_assertions((high - 1) * num_assertions(node))
        tail: Node = EPSILON
        for _ in range(high - low):
            tail = choice([sequence([node, tail]), EPSILON])
        return sequence([node] * low + [tail])

    def _open(self, group: _Group, start: int) -> None:
        source = self._source
        self._source.effort.check_nesting(len(self._groups))
        if source.take("?#"):
            source.until(")", start)
            return
        for opening, name in _REFUSED_GROUPS:
            if source.peek(opening):
                raise source.refused(name, start)
        flags, wide = group.flags, group.wide
        kind = next((kind for opening, kind in _GROUPS if source.take(opening)), None)
        if kind is None and not source.match(_NAME) and source.peek("?"):
            inline = self._inline_flags(group, start)
            if inline is None:
                return
            flags = inline
        kind = kind or "group"
        self._groups.append(_Group(kind, start, flags, wide != kind.startswith("not")))

    def _inline_flags(self, group: _Group, start: int) -> Flags | None:
        """(?i:...) opens a group with these flags; (?i) sets them for the whole pattern and answers None."""
        source = self._source
        found = source.match(_INLINE_FLAGS)
        if found is None or found[0] == "?)":
            recurses = source.pattern[start + 2 : start + 3].isdigit()
            name = "recursion" if recurses else "this kind of group"
            raise source.refused(name, start)
        changes = {}
        for letters, value in ((found[1], True), (found[2] or "", False)):
            for letter in letters:
                if letter not in _FLAGS and letter != "u":
                    raise source.refused(f"the flag {letter}", start)
                if letter in _FLAGS:
                    changes[_FLAGS[letter]] = value
        flags = replace(group.flags, **changes)
        if found[3] == ":":
            return flags
        if len(self._groups) > 1 or group.nodes or group.options or found[2]:
            raise source.error("flags for the whole pattern must stand at its start", start)
        group.flags = flags
        return None

    def _close(self, start: int) -> None:
        if len(self._groups) == 1:
            raise self._source.error("there is no group to close", start)
        group = self._groups.pop()
        node = group.close()
        outer = self._groups[-1]
        negative = group.kind.startswith("not")
        if group.kind.endswith("ahead"):
            self._assertion(outer, Follows(node, negative), repeatable=True)
        elif group.kind.endswith("behind"):
            conditions = [self._behind(option, negative, group.start) for option in group.options]
            self._assertion(outer, sequence(conditions) if negative else choice(conditions), repeatable=True)
        else:
            outer.add(node)

    def _behind(self, option: Node, negative: bool, start: int) -> Node:
        if option is AT_START:
            return Preceded(CharSet(()), True, negative)
        if not is_plain(option):
            raise self._source.refused("an assertion inside a lookbehind", start)
        chars = _one_character(option)  # type: ignore[arg-type]
        if chars is not None:
            return Preceded(chars, False, negative)
        return Behind(option, negative, start)  # type: ignore[arg-type]


def _one_character(expression: Expression) -> CharSet | None:
    """The set of characters that it matches, if it matches nothing but single characters."""
    match expression:
        case CharSet():
            return expression
        case Literal(text) if len(text) == 1:
            return CharSet.chars(text)
        case Alternation(options):
            sets = [_one_character(option) for option in options]
            known = [chars for chars in sets if chars is not None]
            if len(known) == len(sets):
                return CharSet.of(char_range for chars in known for char_range in chars.ranges)
    return None
