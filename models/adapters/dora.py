"""DoRA (Liu et al. 2024, arXiv:2402.09353) as a change of W: W' = m / ‖W + BA‖ · (W + BA).

The norms depend on the model's own weights, which are gone through in blocks. They need no product of the size of W:
‖w + bA‖² = ‖w‖² + 2 b · (A w) + b (A Aᵀ) bᵀ for each output row w. Sums are in float64, but for A w, which takes nearly
all of the time: it is in the weights' own precision. Knows no files.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from cadenza.models.adapters.adapter import LowRank
from cadenza.models.adapters.arrays import Array, as_array, as_tensor
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.errors import ModelError

_ELEMENTS_AT_ONCE = 1 << 20


def linear(
    name: str, magnitude: Tensor, low_rank: LowRank, weight: Tensor | None, base: BaseWeights
) -> tuple[LowRank, Tensor]:
    """(`low_rank` with the magnitudes in its b, gain [out_features]). weight: in place of the model's."""
    w = as_array(base.linear(name) if weight is None else weight)
    a, b = as_array(low_rank.a).astype(np.float64), as_array(low_rank.b).astype(np.float64)
    _check(name, magnitude, b.shape[0])
    square = _square_of_product(b, np.einsum("ri,si->rs", a, a))
    a = a.astype(w.dtype)
    for rows in _blocks(w.shape[0], w.shape[1]):
        whole = w[rows].astype(np.float64)
        square[rows] += np.einsum("oi,oi->o", whole, whole)
        square[rows] += 2 * np.einsum("or,or->o", b[rows], np.einsum("oi,ri->or", w[rows], a))
    return _with_magnitude(name, low_rank, magnitude, square)


def embedding(
    name: str, magnitude: Tensor, low_rank: LowRank, weight: Tensor | None, base: BaseWeights
) -> tuple[LowRank, Tensor]:
    """(`low_rank` with the magnitudes in its b, gain [embedding_dim]): norms of the table's columns."""
    a, b = as_array(low_rank.a).astype(np.float64), as_array(low_rank.b).astype(np.float64)
    num_tokens, dim = a.shape[1], b.shape[0]
    _check(name, magnitude, dim)
    square = _square_of_product(b, np.einsum("rt,st->rs", a, a))
    for rows in _blocks(num_tokens, dim):
        stop = min(rows.stop, num_tokens)
        table = base.embedding(name, rows.start, stop) if weight is None else weight[rows]
        part = as_array(table).astype(np.float64)
        square += np.einsum("td,td->d", part, part)
        square += 2 * np.einsum("dr,dr->d", b, np.einsum("td,rt->dr", part, a[:, rows]))
    return _with_magnitude(name, low_rank, magnitude, square)


def _square_of_product(b: Array, product: Array) -> Array:
    """b product bᵀ for each row of b; product: [rank, rank]."""
    square: Array = np.einsum("or,or->o", b, np.einsum("os,rs->or", b, product))
    return square


def _with_magnitude(name: str, low_rank: LowRank, magnitude: Tensor, square: Array) -> tuple[LowRank, Tensor]:
    """square: [out_features] or [embedding_dim] of the norms."""
    if not (square > 0).all():
        raise ModelError(
            f"{name} cannot be adapted by DoRA: weights that it divides by the norm of are all 0"
        )
    b = as_array(low_rank.b)
    factor = as_array(magnitude).astype(np.float64) / np.sqrt(square)
    gain = as_tensor((factor - 1).astype(b.dtype))
    return LowRank(low_rank.a, as_tensor((b * factor[:, None]).astype(b.dtype))), gain


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS_AT_ONCE // width)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _check(name: str, magnitude: Tensor, size: int) -> None:
    if tuple(magnitude.shape) != (size,):
        raise ModelError(
            f"{name}.lora_magnitude_vector has shape {tuple(magnitude.shape)}, the model's layer has ({size},)"
        )
