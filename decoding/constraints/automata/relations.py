"""Questions about two automata, answered by walking both at once and no further than needed."""

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.errors import ConstraintTooComplex
from cadenza.decoding.constraints.limits import Effort

_MAX_PAIRS = 4_000_000


def intersects(a: DFA, b: DFA, effort: Effort) -> bool:
    """Whether some text is accepted by both."""
    return _find_pair(a, b, effort, b_accepts=True)


def is_subset(a: DFA, b: DFA, effort: Effort) -> bool:
    """Whether every text that `a` accepts is accepted by `b`."""
    return not _find_pair(a, b, effort, b_accepts=False)


def _find_pair(a: DFA, b: DFA, effort: Effort, *, b_accepts: bool) -> bool:
    """Whether a text that `a` accepts leads `b` to a state that accepts, or does not (being dead is one)."""
    if a.is_empty:
        return False
    width = b.num_states + 1
    dead = b.num_states
    b_table = np.where(b.table < 0, dead, b.table)
    b_table = np.vstack([b_table, np.full((1, b.table.shape[1]), dead, b.table.dtype)])
    b_result = np.append(b.accepting, False) == b_accepts
    classes = np.unique(np.stack([a.byte_class, b.byte_class]), axis=1).astype(np.intp)
    a_table, b_table = a.table[:, classes[0]], b_table[:, classes[1]]
    seen: NDArray[np.int64] = np.empty(0, np.int64)
    fresh = np.array([0 if not b.is_empty else dead], np.int64)
    while len(fresh):
        first, second = fresh // width, fresh % width
        if (a.accepting[first] & b_result[second]).any():
            return True
        seen = _merged(seen, fresh)
        effort.spend(16 + len(fresh))
        if len(seen) > _MAX_PAIRS:
            raise ConstraintTooComplex(f"comparing two parts needs more than {_MAX_PAIRS} pairs of states")
        goes = a_table[first]
        if b_accepts:
            goes = np.where(b_table[second] == dead, -1, goes)
        pairs = goes.astype(np.int64) * width + b_table[second]
        fresh = np.unique(pairs[goes >= 0])
        fresh = fresh[~np.isin(fresh, seen, assume_unique=True)]
    return False


def _merged(seen: NDArray[np.int64], fresh: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([seen, fresh])
