"""Sampling on the device: from logits to one token per row, in one reading of the vocabulary.

Rows that want nothing but a constraint, temperature, top-k, top-p, min-p and the draw. With x the row's logits where
they are allowed and -inf elsewhere, M the largest and s = (x - M) / T,

    K     = {i: #{j: s_j > s_i} < top_k  and  mass{j: s_j > s_i} < top_p Z  and  s_i >= ln(min_p)}
    token = argmax over K of s + g, of equal ones the lowest id

where mass is the sum of exp(s), Z that of all tokens, or of the top_k with all that equal the last of them, and g the
noise of `noise`: so the most likely tokens always stay, and ties are not split. That is what `sampling` draws after
top-k, top-p and min-p have each renormalized what the one before has left, since renormalizing moves no comparison.
A row's token is a function of its own logits and parameters. Temperature 0 is greedy: argmax of x, the lowest id.

`fused_sampling` needs a GPU (or Triton's interpreter), `fused_sampling_reference` is the definition in float64. The
algorithm is told in `fused_sampling_kernels`. Knows no requests, no penalties (`edited` rows have them), and no other
truncation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cadenza.kernels.noise import BLOCK, gumbel, random_words

OK = 0
NOTHING_ALLOWED = 1
"""Every token is forbidden, or of logit -inf."""
NOT_NUMBERS = 2
"""A NaN or +inf is among what is allowed."""

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU. Fusion of products and sums is
# said, because Triton's default changes with its version, and the last bit with it.
BLOCKS_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
CHOOSE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

_GROUP = 8


@dataclass(frozen=True, slots=True)
class FusedRows:
    """R rows, each tensor [R], contiguous; int32 but for what is said. In parentheses: off."""

    logits_row: Tensor
    """The row of `logits`; several rows may share one."""
    edited_row: Tensor
    """The row of `edited` that is read in its place for the choice (-1)."""
    mask_row: Tensor
    """The row of `bitmask` (-1)."""
    num_tokens: Tensor
    """The size of the row's vocabulary: tokens from it on are never chosen."""
    num_columns: Tensor
    """Columns of `logits` that the model's own log-softmax is over; more or fewer than `num_tokens`."""
    temperature: Tensor
    """float32; 0: greedy."""
    top_k: Tensor
    """(0)."""
    top_p: Tensor
    """float32 (1)."""
    min_p: Tensor
    """float32 (0)."""
    seed: Tensor
    """int64, read as 64 unsigned bits."""
    branch: Tensor
    position: Tensor
    """Tokens generated before this one."""


@dataclass(frozen=True, slots=True)
class FusedDraws:
    tokens: Tensor
    """[R] int32; -1 where the status is not OK."""
    status: Tensor
    """[R] int32: OK, NOTHING_ALLOWED or NOT_NUMBERS."""
    logprob: Tensor
    """[R] float32: of the token in the model's own log-softmax: unedited, unmasked, of temperature 1. Undefined where
    it was not wanted or the status is not OK, as `rank`."""
    rank: Tensor
    """[R] int32: 1 + the number of columns whose raw logit is greater than the token's."""


def fused_sampling(
    logits: Tensor, edited: Tensor | None, bitmask: Tensor | None, rows: FusedRows, *, wants_logprobs: bool
) -> FusedDraws:
    """logits: [L, V] float32, bfloat16 or float16; edited: [E, at most V] float32; rows of both at any distance, of
    multiples of 16 elements best. bitmask: [M, words] int32, bit t & 31 of word t >> 5; a token without a bit is not
    allowed."""
    from cadenza.kernels import fused_sampling_kernels as kernels

    edited = logits.new_empty(0, 0, dtype=torch.float32) if edited is None else edited
    bitmask = logits.new_empty(0, 0, dtype=torch.int32) if bitmask is None else bitmask
    _check(logits, edited, bitmask, rows)
    num_rows, num_blocks = len(rows.seed), -(-logits.shape[1] // BLOCK)
    draws = FusedDraws(*(torch.empty(num_rows, dtype=kind, device=logits.device) for kind in _DRAWS))
    if not num_rows:
        return draws
    aligned = -(-num_rows // 4) * 4  # so that each of the four begins at 16 bytes: Triton compiles for that
    maxima, masses, raw_maxima, raw_masses = torch.empty(4, aligned, num_blocks, device=logits.device)
    best = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    is_ragged = logits.shape[1] % _GROUP > 0 or edited.shape[1] % _GROUP > 0
    inputs = (
        *(logits, logits.stride(0), logits.shape[1]),
        *(edited, edited.stride(0) if len(edited) else 0, edited.shape[1]),
        *(bitmask, bitmask.stride(0) if len(bitmask) else 0, bitmask.shape[1]),
        *(rows.logits_row, rows.edited_row, rows.mask_row, rows.num_tokens, rows.num_columns),
        rows.temperature,
    )
    partial = (maxima, masses, best, raw_maxima, raw_masses)
    kernels._blocks_kernel[(num_rows, num_blocks)](
        *(*inputs, rows.top_p, rows.seed, rows.branch, rows.position),
        *(*partial, is_ragged, wants_logprobs),
        **BLOCKS_OPTIONS,
    )
    kernels._choose_kernel[(num_rows,)](
        *(*inputs, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.branch, rows.position),
        *(*partial, draws.tokens, draws.status, draws.logprob, draws.rank),
        *(num_blocks, 1 << (num_blocks - 1).bit_length(), is_ragged, wants_logprobs),
        **CHOOSE_OPTIONS,
    )
    return draws


_DRAWS = (torch.int32, torch.int32, torch.float32, torch.int32)
_KINDS = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32, "seed": torch.int64}


def _check(logits: Tensor, edited: Tensor, bitmask: Tensor, rows: FusedRows) -> None:
    assert logits.stride(1) == 1
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert edited.dtype == torch.float32
    assert bitmask.dtype == torch.int32
    assert edited.shape[1] <= logits.shape[1]
    for table in (edited, bitmask):
        assert table.stride(1) == 1
    for name in FusedRows.__dataclass_fields__:
        column: Tensor = getattr(rows, name)
        assert column.shape == rows.seed.shape, name
        assert column.dtype == _KINDS.get(name, torch.int32), name
        assert column.is_contiguous(), name


def fused_sampling_reference(
    logits: Tensor, edited: Tensor | None, bitmask: Tensor | None, rows: FusedRows, *, wants_logprobs: bool
) -> FusedDraws:
    """`fused_sampling` in plain torch and float64, sorting: the statistics are always computed."""
    raw = logits[rows.logits_row.long()].double()
    x = _allowed(raw, edited, bitmask, rows)
    largest = x.amax(dim=-1, keepdim=True)  # NaN where there is one
    status = torch.where(
        largest.isneginf(), NOTHING_ALLOWED, torch.where(largest < torch.inf, OK, NOT_NUMBERS)
    )
    is_greedy = rows.temperature[:, None] == 0
    s = (x - largest) / torch.where(is_greedy, 1.0, rows.temperature[:, None].double())
    seed, branch, position = (column[:, None].long() for column in (rows.seed, rows.branch, rows.position))
    words = random_words(seed, branch, position, torch.arange(x.shape[1], device=x.device)[None, :])
    scores = (s + gumbel(words)).masked_fill(~_kept(s, rows), -torch.inf)
    tokens = torch.where(is_greedy, x, scores).nan_to_num(nan=-torch.inf).argmax(dim=-1, keepdim=True)
    columns = torch.arange(raw.shape[1], device=raw.device) < rows.num_columns[:, None]
    chosen = raw.gather(1, tokens)
    logprob = chosen - raw.masked_fill(~columns, -torch.inf).logsumexp(dim=-1, keepdim=True)
    rank = 1 + ((raw > chosen) & columns).sum(dim=-1)
    tokens = torch.where(status == OK, tokens, -1)
    return FusedDraws(tokens[:, 0].int(), status[:, 0].int(), logprob[:, 0].float(), rank.int())


def _allowed(raw: Tensor, edited: Tensor | None, bitmask: Tensor | None, rows: FusedRows) -> Tensor:
    """[R, V]: what the choice is made from."""
    x, token = raw.clone(), torch.arange(raw.shape[1], device=raw.device)
    if edited is not None:
        is_edited = rows.edited_row >= 0
        own = edited[rows.edited_row[is_edited].long()].double()
        x[is_edited] = torch.nn.functional.pad(own, (0, x.shape[1] - own.shape[1]), value=-torch.inf)
    x[token >= rows.num_tokens[:, None]] = -torch.inf
    if bitmask is not None:
        is_masked = rows.mask_row >= 0
        words = torch.nn.functional.pad(bitmask[rows.mask_row[is_masked].long()], (0, len(token)))
        bits = (words[:, token >> 5] >> (token & 31).int()) & 1
        x[is_masked] = x[is_masked].masked_fill(bits == 0, -torch.inf)
    return x


def _kept(s: Tensor, rows: FusedRows) -> Tensor:
    """[R, V] bool: K."""
    ordered, order = s.sort(dim=-1, descending=True)
    mass = ordered.exp()
    before = torch.searchsorted(-ordered, -ordered)  # how many are greater: equal ones have the same number
    is_in_top_k = (before < rows.top_k[:, None]) | (rows.top_k[:, None] <= 0)
    total = torch.where(is_in_top_k, mass, 0.0).sum(dim=-1, keepdim=True)
    above = torch.nn.functional.pad(mass.cumsum(dim=-1), (1, 0)).gather(1, before)
    is_in_top_p = (above < rows.top_p[:, None].double() * total) | (rows.top_p[:, None] >= 1)
    is_kept = is_in_top_k & (is_in_top_p | (before == 0))
    is_kept &= ordered >= rows.min_p[:, None].double().log().clamp_max(0.0)
    return torch.zeros_like(is_kept).scatter(1, order, is_kept)


def fused_sampling_bytes(logits: Tensor, rows: FusedRows, num_words: int, *, wants_logprobs: bool) -> int:
    """What memory must move: once each row that is read of logits, edited and bitmask, whoever shares it. num_words:
    of a row of the bitmask. Waits for the device."""
    is_edited, size = rows.edited_row >= 0, logits.shape[1]
    read = rows.logits_row if wants_logprobs else rows.logits_row[~is_edited]
    moved = len(read.unique()) * size * logits.element_size()
    moved += len(rows.edited_row[is_edited].unique()) * size * 4
    return moved + len(rows.mask_row[rows.mask_row >= 0].unique()) * num_words * 4
