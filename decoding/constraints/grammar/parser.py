"""Follows a text byte by byte: is it a beginning of a text of the grammar, what may come next, how soon can it end.

An exact recognizer of any context-free grammar. Every text that it accepts can be completed, because automata are
trimmed and all rules derive something. Knows nothing of tokens.
"""

from collections.abc import Sequence

from cadenza.decoding.constraints.grammar.chart import Chart, Frontier
from cadenza.decoding.constraints.grammar.positions import CompiledGrammar
from cadenza.decoding.constraints.grammar.terminal import BYTE

_NEVER = 1 << 30


class Parser:
    """At the start of a text. Forks share what they learn of the grammar; each may have a thread of its own, since
    to learn the same thing twice does no harm. Methods raise MatcherError where the text has too many readings; the
    parser is then as before.
    """

    __slots__ = ("__weakref__", "_chart", "_frontiers")

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._chart = Chart(grammar)
        self._frontiers: list[Frontier] = [self._chart.start]
        """Behind each byte of the text."""
        self._chart.follow(self)

    @property
    def num_bytes(self) -> int:
        """Of the text so far."""
        return len(self._frontiers) - 1

    @property
    def num_items(self) -> int:
        """The work done so far, forks included: what was looked at to find frontiers."""
        return self._chart.num_items

    @property
    def is_complete(self) -> bool:
        """The text so far is in the language."""
        return self._frontiers[-1].is_complete

    @property
    def is_ended(self) -> bool:
        """The text is complete, and nothing may follow."""
        return not self._frontiers[-1].threads

    def advance(self, data: bytes) -> bool:
        """Go on by all of the bytes; False, and nothing changes, if they may not follow."""
        frontier = self._frontiers[-1]
        passed = []
        for byte in data:
            following = frontier.next.get(byte) or self._chart.step(frontier, byte)
            if following is None:
                return False
            frontier = following
            passed.append(frontier)
        self._frontiers += passed
        return True

    def rollback(self, num_bytes: int) -> None:
        """Forget the last bytes."""
        if not 0 <= num_bytes <= self.num_bytes:
            raise ValueError(f"cannot go back {num_bytes} bytes in a text of {self.num_bytes}")
        del self._frontiers[len(self._frontiers) - num_bytes :]

    def fork(self) -> "Parser":
        """A parser of the same text that goes on by itself. Copies a pointer for each byte of the text."""
        parser = Parser.__new__(Parser)
        parser._chart = self._chart
        parser._frontiers = self._frontiers.copy()
        self._chart.follow(parser)
        return parser

    def min_bytes(self) -> int:
        """Fewest bytes to a complete text."""
        return self._chart.price(self._frontiers[-1]) // BYTE

    def completion(self) -> bytes:
        """A text of so many bytes that completes this one; with as few control characters as there can be."""
        return self._chart.completion(self._frontiers[-1])

    def next_bytes(self) -> bytes:
        """All bytes that may come next, in ascending order."""
        return self._chart.next_bytes(self._frontiers[-1])

    @property
    def place(self) -> object:
        """Equal places, of parsers that share what they learn, go on alike."""
        return self._frontiers[-1]

    def spelled(self, texts: Sequence[bytes], shared: Sequence[int]) -> list[int]:
        """Which of the texts may come next. They are sorted; shared: how many bytes each begins with that the one
        before it begins with, too."""
        step = self._chart.step
        path = [self._frontiers[-1]]
        dead = _NEVER  # as long as that is the beginning of the last text that cannot go on
        found = []
        for number, (text, common) in enumerate(zip(texts, shared, strict=True)):
            if common >= dead:
                continue
            dead = _NEVER
            del path[common + 1 :]
            frontier = path[-1]
            for length in range(common, len(text)):
                following = frontier.next.get(text[length]) or step(frontier, text[length])
                if following is None:
                    dead = length + 1
                    break
                frontier = following
                path.append(frontier)
            else:
                found.append(number)
        return found

    def forced(self, limit: int) -> bytes:
        """The bytes, up to `limit`, that must come next; none where the text may end."""
        frontier = self._frontiers[-1]
        run = bytearray()
        while len(run) < limit and (byte := self._chart.sole_byte(frontier)) >= 0:
            following = frontier.next.get(byte) or self._chart.step(frontier, byte)
            assert following is not None
            run.append(byte)
            frontier = following
        return bytes(run)
