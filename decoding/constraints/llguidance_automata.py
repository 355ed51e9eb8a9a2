"""Automata of terminals, trimmed after surgery or laid out as one; and sets of bytes or terminals as integers."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.limits import Effort

Ints = NDArray[np.int64]


def byte_mask(members: Iterable[int]) -> int:
    """An integer with a bit for each member."""
    mask = 0
    for member in members:
        mask |= 1 << member
    return mask


def members_of(mask: int) -> list[int]:
    """The members of a mask of any length, ascending."""
    data = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), np.uint8)
    members: list[int] = np.flatnonzero(np.unpackbits(data, bitorder="little")).tolist()
    return members


def trimmed(table: NDArray[np.int32], accepting: NDArray[np.bool_]) -> DFA:
    """table: [state, byte]. Without the states that are of no use; perhaps not minimal."""
    useful = accepting.copy()
    while True:
        more = useful | ((table >= 0) & useful[table]).any(axis=1)
        if (more == useful).all():
            break
        useful = more
    if not useful[0]:
        return DFA(np.zeros(256, np.uint8), np.empty((0, 1), np.int32), np.empty(0, np.bool_))
    reached = np.zeros(len(table), np.bool_)
    fresh = np.array([0])
    while len(fresh):
        reached[fresh] = True
        following = np.unique(table[fresh])
        following = following[following >= 0]
        fresh = following[useful[following] & ~reached[following]]
    kept = reached.nonzero()[0]
    number = np.full(len(table) + 1, -1, np.int32)
    number[kept] = np.arange(len(kept))
    columns, byte_class = np.unique(number[table[kept]], axis=1, return_inverse=True)
    return DFA(byte_class.reshape(-1).astype(np.uint8), np.ascontiguousarray(columns), accepting[kept])


def without_empty(dfa: DFA) -> DFA:
    """What the automaton accepts except the empty text."""
    table = dfa.table[:, dfa.byte_class]
    table = np.vstack([table[:1], table])
    table[table >= 0] += 1
    return trimmed(table, np.append(False, dfa.accepting))


def is_suffix_free(dfa: DFA, effort: Effort) -> bool:
    """Whether no accepted text ends in another one."""
    pending = [(state, 0) for state in set(dfa.table[dfa.table >= 0].tolist())]  # behind at least a byte
    seen = set(pending)
    rows = dfa.table.tolist()
    while pending:
        whole, ending = pending.pop()
        if dfa.accepting[whole] and dfa.accepting[ending]:
            return False
        effort.spend()
        for pair in zip(rows[whole], rows[ending], strict=True):
            if min(pair) >= 0 and pair not in seen:
                seen.add(pair)
                pending.append(pair)
    return True


def few_words(dfa: DFA, most: int) -> list[bytes] | None:
    """All texts that are accepted, None if they are more than `most` or long."""
    words: list[bytes] = []
    beginnings = [(0, b"")]
    rows = dfa.table[:, dfa.byte_class]
    while beginnings:
        state, text = beginnings.pop()
        if dfa.accepting[state]:
            words.append(text)
        following = np.flatnonzero(rows[state] >= 0)
        if len(words) + len(beginnings) + len(following) > most or len(text) > most:
            return None
        beginnings += [(int(rows[state, byte]), text + bytes([byte])) for byte in following]
    return sorted(words)


@dataclass(frozen=True, slots=True)
class Automata:
    """Of the terminals that are not literals: one automaton with several starts.

    In the order of their heads, the bytes with which every text of a terminal begins. Of two terminals no text has a
    common beginning that matters unless one's head begins with the other's, and then it is not before `ends` of the
    other.
    """

    codes: list[int]
    ends: Ints
    """[index] the first index whose head does not begin with this one's, later ones do not either."""
    starts: Ints
    owner: Ints
    """[state] index into codes."""
    table: NDArray[np.int32]
    """[state, class]."""
    accepting: NDArray[np.bool_]
    byte_class: NDArray[np.intp]
    follow: NDArray[np.bool_]
    """[index, class] whether some byte of the class may follow the terminal."""

    @classmethod
    def of(cls, dfas: dict[int, DFA], follow: list[int], effort: Effort) -> "Automata":
        """dfas: by terminal, at least one; follow: by terminal, the mask of the bytes that may come after it."""
        heads = {code: _head(dfa) for code, dfa in dfas.items()}
        codes = sorted(dfas, key=lambda code: heads[code])
        dfas = {code: dfas[code] for code in codes}
        sizes = np.array([dfa.num_states for dfa in dfas.values()])
        effort.check_states(int(sizes.sum()))
        starts = np.append(0, sizes.cumsum()[:-1])
        classes: Ints = np.zeros(256, np.int64)
        for dfa in dfas.values():
            effort.spend(16)
            classes = np.unique(classes * 256 + dfa.byte_class, return_inverse=True)[1].reshape(-1)
        example = np.unique(classes, return_index=True)[1]
        parts = []
        follow_class = np.zeros((len(dfas), len(example)), np.bool_)
        for index, (code, dfa) in enumerate(dfas.items()):
            effort.spend(4 + dfa.num_states // 8)
            part = dfa.table[:, dfa.byte_class[example]]
            parts.append(np.where(part >= 0, part + starts[index], -1))
            follow_class[index, classes[members_of(follow[code])]] = True
        return cls(
            codes,
            _ends([heads[code] for code in codes]),
            starts,
            np.repeat(np.arange(len(dfas)), sizes),
            np.concatenate(parts).astype(np.int32),
            np.concatenate([dfa.accepting for dfa in dfas.values()]),
            classes.astype(np.intp),
            follow_class,
        )


def _head(dfa: DFA) -> bytes:
    """The bytes that come first whatever comes then."""
    rows = (dfa.table >= 0)[:, dfa.byte_class]
    head = bytearray()
    state = 0
    while not dfa.accepting[state] and rows[state].sum() == 1:
        head.append(int(rows[state].argmax()))
        state = dfa.next(state, head[-1])
    return bytes(head)


def _ends(heads: list[bytes]) -> Ints:
    ends = np.full(len(heads), len(heads), np.int64)
    open_heads: list[int] = []
    for index, head in enumerate(heads):
        while open_heads and not head.startswith(heads[open_heads[-1]]):
            ends[open_heads.pop()] = index
        open_heads.append(index)
    return ends


def sorted_unique(numbers: Ints) -> Ints:
    numbers = np.sort(numbers)
    return numbers[np.append(True, numbers[1:] != numbers[:-1])] if len(numbers) else numbers
