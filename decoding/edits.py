"""Penalties, bias and bans of a batch's rows as one list of edits of logits, for a GPU.

The same as `processors` does to rows one after another, gathered on the host: at most one edit per row and token. Knows
rows and their parameters; no devices.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadenza.decoding.row import Row


@dataclass(frozen=True, slots=True)
class EditList:
    """Each [n], row by row."""

    rows: NDArray[np.int32]
    """Numbers of the rows that have edits, counted from 0 among them."""
    tokens: NDArray[np.int32]
    repetition: NDArray[np.float32]
    """Divides what is positive, multiplies what is not; 1: nothing."""
    offset: NDArray[np.float32]
    """Added after that; -inf bans."""


def has_edits(row: Row) -> bool:
    params = row.sampling
    return bool(
        row.banned
        or params.logit_bias
        or params.repetition_penalty != 1.0
        or row.dry is not None
        or (row.generated and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0))
    )


def edits_of(rows: Sequence[Row], num_columns: int) -> EditList:
    """num_columns: of the logits. What lies beyond them does not exist, and is not edited."""
    own = [_edits(row) for row in rows]
    flat = [
        (number, token, repetition, offset)
        for number, edits in enumerate(own)
        for token, (repetition, offset) in edits.items()
        if token < num_columns
    ]
    columns: Sequence[Sequence[float]] = list(zip(*flat, strict=True)) or [(), (), (), ()]
    return EditList(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int32),
        np.array(columns[2], np.float32),
        np.array(columns[3], np.float32),
    )


def _edits(row: Row) -> dict[int, tuple[float, float]]:
    params = row.sampling
    seen = {*row.prompt, *row.generated} if params.repetition_penalty != 1.0 else set()
    offsets: defaultdict[int, float] = defaultdict(float)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        for token, count in Counter(row.generated).items():
            offsets[token] -= params.frequency_penalty * count + params.presence_penalty
    if row.dry is not None:
        for token, penalty in row.dry.penalties([*row.prompt, *row.generated]).items():
            offsets[token] -= penalty
    for token, bias in params.logit_bias.items():
        offsets[token] += bias
    for token in row.banned:
        offsets[token] = -math.inf
    return {
        token: (params.repetition_penalty if token in seen else 1.0, offsets.get(token, 0.0))
        for token in sorted({*seen, *offsets})
    }
