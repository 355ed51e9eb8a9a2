"""The frontiers of one grammar: the parser's states, made when texts reach them.

A frontier holds all readings of a text: the terminals being read, each with the stack of what comes after it. Equal
frontiers are one object, which remembers where bytes lead, so that the parser turns into a deterministic automaton
where the text repeats itself. Knows nothing of where in a text it is.
"""

from collections.abc import Iterable
from weakref import WeakSet

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.grammar.closure import Closer, Thread
from cadenza.decoding.constraints.grammar.positions import CompiledGrammar
from cadenza.decoding.constraints.grammar.stack import Frame

_MAX_ITEMS = 500_000
_MAX_ITEMS_PER_BYTE = 100
"""Of work over the whole text: bounds what a text with very many readings costs, and what it keeps, which is about
100 bytes per item. Bytes that lead where they led before neither cost nor count."""
_MAX_TEXTS = 8
"""So many times that are granted to texts which are followed at once."""
_MAX_SHARED_THREADS = 64
"""Frontiers of more threads hardly ever come again."""


class Frontier:
    """All readings of one text. Compares by identity."""

    __slots__ = ("cost", "is_complete", "next", "threads")

    def __init__(self, threads: tuple[Thread, ...], is_complete: bool) -> None:
        self.threads = threads
        self.is_complete = is_complete
        self.next: dict[int, Frontier] = {}
        """By the bytes that were tried and may follow."""
        self.cost = 0 if is_complete else -1
        """The price of the cheapest completion, -1 while unknown."""


class Chart:
    """The frontiers of one grammar, shared by a parser and its forks."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.grammar = grammar
        self.closer = Closer(grammar)
        self._known: dict[tuple[Thread | frozenset[Thread] | None, bool], Frontier] = {}
        self._num_threads = 0
        self._num_steps = 0
        self._followers: WeakSet[object] = WeakSet()
        self._max_followers = 1
        start = self.closer.start()
        self.start = self._frontier(start.threads, start.is_complete)

    @property
    def num_items(self) -> int:
        """The work done so far."""
        return self.closer.num_items + self._num_threads

    def follow(self, parser: object) -> None:
        """One more text is followed, as long as there is the parser."""
        self._followers.add(parser)
        self._max_followers = min(max(len(self._followers), self._max_followers), _MAX_TEXTS)

    def step(self, frontier: Frontier, byte: int) -> Frontier | None:
        """Where the byte leads; None if it may not follow."""
        self._account(len(frontier.threads))
        threads: list[Thread] = []
        kernel: dict[Frame, None] = {}
        for thread in frontier.threads:
            number, state, position, node = thread
            terminal = self.grammar.terminals[number]
            state = terminal.table[state * terminal.num_classes + terminal.byte_class[byte]]
            if state < 0:
                continue
            if terminal.sole_byte[state] != -2:
                threads.append((number, state, position, node))
            if terminal.accepting[state]:
                kernel[position, node] = None
        is_complete = False
        if kernel:
            closure = self.closer.close(list(kernel))
            is_complete = closure.is_complete
            threads.extend(closure.threads)
        if not threads and not is_complete:
            return None
        following = self._frontier(threads, is_complete)
        frontier.next[byte] = following
        return following

    def price(self, frontier: Frontier) -> int:
        """Of the cheapest completion."""
        if frontier.cost < 0:
            frontier.cost = min(map(self._price, frontier.threads))
        return frontier.cost

    def completion(self, frontier: Frontier) -> bytes:
        """The text of that price."""
        if frontier.is_complete:
            return b""
        thread = min(frontier.threads, key=self._price)
        number, state, position, node = thread
        text = bytearray(self.grammar.terminals[number].cheapest(state))
        frame: Frame | None = (position, node)
        while frame is not None:
            position, node = frame
            self._append_rest(text, position)
            frame = node.best
        return bytes(text)

    def next_bytes(self, frontier: Frontier) -> bytes:
        """All that may follow, in ascending order."""
        terminals = self.grammar.terminals
        states = {(number, state) for number, state, _, _ in frontier.threads}
        return bytes(
            sorted({byte for number, state in states for byte in terminals[number].next_bytes(state)})
        )

    def sole_byte(self, frontier: Frontier) -> int:
        """The byte that must follow; negative if there is a choice, or the text may end here."""
        terminals = self.grammar.terminals
        sole = -1
        if not frontier.is_complete:
            for number, state, _, _ in frontier.threads:
                byte = terminals[number].sole_byte[state]
                if byte < 0 or sole not in (-1, byte):
                    return -1
                sole = byte
        return sole

    def _price(self, thread: Thread) -> int:
        number, state, position, node = thread
        return self.grammar.terminals[number].cost[state] + self.grammar.cost[position] + node.cost

    def _append_rest(self, text: bytearray, position: int) -> None:
        """The cheapest text of the rest of a production."""
        grammar = self.grammar
        pending = [position]
        while pending:
            position = pending.pop()
            if not grammar.cost[position]:
                continue
            pending.append(grammar.after[position])
            symbol = grammar.symbol[position]
            if symbol < 0:
                pending.append(grammar.best[~symbol])
            else:
                text += grammar.terminals[symbol].cheapest(0)

    def _frontier(self, threads: Iterable[Thread], is_complete: bool) -> Frontier:
        distinct = tuple(dict.fromkeys(threads))
        if len(distinct) > _MAX_SHARED_THREADS:
            return Frontier(distinct, is_complete)
        key = (distinct[0] if len(distinct) == 1 else frozenset(distinct), is_complete)
        frontier = self._known.get(key)
        if frontier is None:
            frontier = self._known[key] = Frontier(distinct, is_complete)
        return frontier

    def _account(self, num_threads: int) -> None:
        self._num_threads += num_threads
        self._num_steps += 1
        if self.num_items > _MAX_ITEMS * self._max_followers + _MAX_ITEMS_PER_BYTE * self._num_steps:
            raise MatcherError("the constraint is too ambiguous: the text can be read in too many ways")
