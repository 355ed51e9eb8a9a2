"""Rows of masks for the drafts of speculative decoding (Leviathan et al. 2023): one for each place that they reach.

The model then sees each draft under the mask that it would have met one token a step. Knows nothing of models or of
who made the drafts, and does not move the matcher.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.matcher import Bitmask, Matcher


def fill_ahead(matcher: Matcher, drafts: Sequence[int], remaining: int, rows: NDArray[np.int32]) -> None:
    """rows: [len(drafts) + 1, num_words]. Row 0 is the mask of the next token, row i the one behind `drafts[:i]`.

    It ends at a draft that its row forbids, that the budget would replace, or after which no token is chosen: the
    later rows are zero. `remaining` is as for `fill`: of the tokens that may still be generated, none is a draft.
    """
    matcher.fill(rows[0], remaining)
    if not len(drafts):
        return
    rows[1:] = 0
    ahead = matcher.fork()
    for number, (token_id, row) in enumerate(zip(drafts, rows, strict=False)):
        left = remaining - number
        if left <= 1 or not _is_allowed(row, token_id):
            return
        try:
            if ahead.accept(token_id, left) != token_id or ahead.is_ended:
                return
            ahead.fill(rows[number + 1], left - 1)
        except MatcherError:  # of a text that may never be written: if it is, the matcher itself will say so
            rows[number + 1] = 0
            return


def _is_allowed(row: Bitmask, token_id: int) -> bool:
    word = token_id >> 5
    return 0 <= word < len(row) and bool(int(row[word]) >> (token_id & 31) & 1)
