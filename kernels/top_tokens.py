"""The best tokens of rows of logits with their log-probabilities, ties to the lowest id: a beam step, or alternatives.

    N = what the row's mask and vocabulary allow                where scores are normalized over what is left
        its first num_columns columns                           elsewhere
    score(t) = logit(t) - log Σ_{u in N} exp(logit(u))          for t both allowed and in N

No vocabulary is sorted. One pass over the logits leaves the sum of exponentials of each block and the largest allowed
logit of each group of 64 consecutive tokens. A token among the `width` best lies in one of the `width` best groups,
compared by largest logit, then lowest id: otherwise each of them would hold a better token. So a second kernel picks
groups out of V / 64 maxima, reads those again, and picks tokens out of 64 * width. Both picks are bitonic (Shanbhag et
al. 2018, "Efficient top-k query processing on massively parallel hardware", Triton's `tl.topk`) over 64-bit keys, the
logit's bits in an order that integers have, above the complement of the id: keys are distinct, so that what is picked
does not depend on how. -0.0 counts as 0.0.

Everything of a row is computed in blocks that the number of columns alone decides: its bits are the same in any batch.
Knows nothing of beams, of the sum of their scores, or of who asks for alternatives. Imports Triton, which only Linux
has: import it where there is a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.fused_sampling import NOT_NUMBERS, NOTHING_ALLOWED, OK

MAX_WIDTH = 64

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU.
BLOCK = 4096
"""Columns of a program that reads logits. It and GROUP decide the order of summation, so the scores' last bits."""

GROUP = 64
WORD = 32
MOST_GROUPS = 4096
"""That are picked from at once: those of 262144 tokens."""

LEAST_PICKED = 8
"""Widths are rounded up to a power of two from this on."""

SCAN_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
PICK_OPTIONS = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class TopRows:
    """What is asked for in R rows: all [R] int32, contiguous, on the device."""

    logits_row: Tensor
    """Several rows may share one."""
    mask_row: Tensor
    """Of the bitmask; -1: everything is allowed."""
    num_tokens: Tensor
    """Tokens from it on are not allowed."""
    num_columns: Tensor
    """That the model's own log-softmax is over. Beyond V there is nothing."""
    is_normalized: Tensor
    """1: scores are normalized over what is allowed; 0: over num_columns."""


@dataclass(frozen=True, slots=True)
class TopTokens:
    scores: Tensor
    """[R, width] float32, best first; -inf where fewer are allowed, and everywhere if status is not OK."""
    tokens: Tensor
    """[R, width] int32, of equal logits the lowest id first; -1 where the score is -inf."""
    status: Tensor
    """[R] int32, as `fused_sampling` has them: OK, NOTHING_ALLOWED (or -inf all of it), NOT_NUMBERS: a NaN or +inf in
    N."""


def top_tokens(logits: Tensor, bitmask: Tensor | None, rows: TopRows, width: int) -> TopTokens:
    """The `width` (1 … 64) best tokens of each row.

    logits: [L, V] float32, bfloat16 or float16, rows at any distance; a logit of -inf is a token that is not allowed.
    bitmask: [M, words] int32, token t is allowed by bit t & 31 of word t >> 5, and not by words that there are not;
    None: mask_row is not read.
    """
    num_columns, num_rows, device = logits.shape[1], len(rows.logits_row), logits.device
    assert 1 <= width <= MAX_WIDTH
    assert num_columns >= 1
    assert logits.stride(1) == 1
    for column in (rows.logits_row, rows.mask_row, rows.num_tokens, rows.num_columns, rows.is_normalized):
        assert column.dtype == torch.int32
        assert column.shape == (num_rows,)
        assert column.is_contiguous()
    if bitmask is not None:
        assert bitmask.dtype == torch.int32
        assert bitmask.stride(1) == 1
    result = TopTokens(
        scores=torch.empty(num_rows, width, dtype=torch.float32, device=device),
        tokens=torch.empty(num_rows, width, dtype=torch.int32, device=device),
        status=torch.empty(num_rows, dtype=torch.int32, device=device),
    )
    if num_rows:
        words = (None, 0, 0) if bitmask is None else (bitmask, bitmask.stride(0), bitmask.shape[1])
        asked = (rows.logits_row, rows.mask_row, rows.num_tokens, rows.num_columns, rows.is_normalized)
        read = (logits, logits.stride(0), *words, *asked)
        num_blocks = -(-num_columns // BLOCK)
        largest = torch.empty(num_rows, num_blocks * (BLOCK // GROUP), dtype=torch.float32, device=device)
        totals = torch.empty(num_rows, num_blocks, 2, dtype=torch.float32, device=device)
        _scan_kernel[(num_rows, num_blocks)](
            *(*read, largest, totals, num_columns, num_blocks, BLOCK, GROUP, WORD), **SCAN_OPTIONS
        )
        _pick(read, largest, totals, result, num_columns)
    return result


def _pick(
    read: tuple[Tensor | int | None, ...],
    largest: Tensor,
    totals: Tensor,
    result: TopTokens,
    num_columns: int,
) -> None:
    """read: the first arguments of both kernels."""
    (num_rows, num_groups), num_blocks, width = largest.shape, totals.shape[1], result.tokens.shape[1]
    power = triton.next_power_of_2
    _pick_kernel[(num_rows,)](
        *(*read, largest, totals, result.scores, result.tokens, result.status, width),
        *(num_columns, num_blocks, power(num_blocks), num_groups, min(MOST_GROUPS, power(num_groups)), GROUP),
        max(LEAST_PICKED, power(width)),
        **PICK_OPTIONS,
    )


def top_tokens_reference(logits: Tensor, bitmask: Tensor | None, rows: TopRows, width: int) -> TopTokens:
    """`top_tokens` in plain torch, which sorts: float64 for float64 logits, else float32."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    values = logits[rows.logits_row.long()].to(torch.promote_types(logits.dtype, torch.float32))
    is_allowed = columns < rows.num_tokens[:, None]
    if bitmask is not None and bitmask.numel():
        bits = bitmask[rows.mask_row.clamp_min(0).long()][
            :, columns.clamp_max(32 * bitmask.shape[1] - 1) // 32
        ]
        has_bit = ((bits >> (columns % 32)) & 1 == 1) & (columns < 32 * bitmask.shape[1])
        is_allowed &= has_bit | (rows.mask_row < 0)[:, None]
    is_counted = torch.where(
        rows.is_normalized[:, None] == 1, is_allowed, columns < rows.num_columns[:, None]
    )
    is_wrong = ((values.isnan() | values.isposinf()) & is_counted).any(dim=-1)
    total = values.masked_fill(~is_counted, -torch.inf).logsumexp(dim=-1, keepdim=True)
    values = values.masked_fill(~(is_allowed & is_counted) | is_wrong[:, None], -torch.inf)
    best, tokens = values.sort(dim=-1, descending=True, stable=True)
    missing = width - logits.shape[1]
    best = torch.nn.functional.pad(best[:, :width], (0, max(missing, 0)), value=-torch.inf)
    tokens = torch.nn.functional.pad(tokens[:, :width], (0, max(missing, 0)), value=-1)
    is_found = best > -torch.inf
    return TopTokens(
        scores=torch.where(is_found, best - total, -torch.inf),
        tokens=torch.where(is_found, tokens, -1).int(),
        status=torch.where(is_wrong, NOT_NUMBERS, torch.where(is_found[:, 0], OK, NOTHING_ALLOWED)).int(),
    )


def top_tokens_bytes(num_rows: int, num_columns: int, num_masked: int, width: int, dtype: torch.dtype) -> int:
    """What memory must move: distinct rows of logits once, the masks of `num_masked` rows, what is asked and found."""
    return (
        num_rows * (num_columns * dtype.itemsize + 5 * 4 + 8 * width + 4)
        + num_masked * -(-num_columns // 32) * 4
    )


# logits: [any, V]; bitmask: [any, words], None where there is none; largest: [R, groups]; totals: [R, BLOCKS, 2], a
# block's largest logit and its sum of exponentials of logits less that.


@triton.jit(do_not_specialize=["mask_stride", "words"])  # type: ignore[untyped-decorator]
def _scan_kernel(  # type: ignore[no-untyped-def]
    logits, logits_stride, bitmask, mask_stride, words,
    logits_row, mask_row, num_tokens, num_columns, is_normalized, largest, totals,
    V: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Program (row, block of columns), held as rows of one word of a mask each."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    word = tl.arange(0, BLOCK // WORD) + start // WORD
    column = word[:, None] * WORD + tl.arange(0, WORD)[None, :]
    at = logits + tl.load(logits_row + row).to(tl.int64) * logits_stride + column
    if start + BLOCK <= V:  # without a mask, whose ragged end would have all columns loaded one by one
        value = tl.load(at).to(tl.float32)
    else:
        value = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
    is_allowed = column < tl.load(num_tokens + row)
    if bitmask is not None:
        mask = tl.load(mask_row + row).to(tl.int64)
        num_words = tl.where(mask >= 0, words, 0)
        bits = tl.load(bitmask + mask * mask_stride + word, mask=word < num_words, other=0)
        bits = tl.where(mask >= 0, bits, -1)
        is_allowed &= ((bits[:, None] >> tl.arange(0, WORD)[None, :]) & 1) != 0
    is_counted = column < tl.load(num_columns + row)
    if tl.load(is_normalized + row) != 0:
        is_counted = is_allowed
    value = tl.where(value == value, value, float("inf"))  # which no maximum loses, as it would NaN
    value = tl.where(is_counted, value, float("-inf"))
    top = tl.max(tl.max(value, 1), 0)
    total = tl.sum(tl.sum(tl.exp(value - tl.where(top == float("-inf"), 0.0, top)), 1), 0)
    place = totals + (row * BLOCKS + tl.program_id(1)) * 2
    tl.store(place, top)
    tl.store(place + 1, total)
    of_words = tl.max(tl.where(is_allowed, value, float("-inf")), 1)
    of_groups = tl.max(tl.reshape(of_words, (BLOCK // GROUP, GROUP // WORD)), 1)
    group = tl.arange(0, BLOCK // GROUP) + start // GROUP
    tl.store(largest + row * (BLOCKS * (BLOCK // GROUP)) + group, of_groups)


@triton.jit(do_not_specialize=["mask_stride", "words", "width"])  # type: ignore[untyped-decorator]
def _pick_kernel(  # type: ignore[no-untyped-def]
    logits, logits_stride, bitmask, mask_stride, words,
    logits_row, mask_row, num_tokens, num_columns, is_normalized, largest, totals, scores, tokens, status, width,
    V: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_2: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr,
    GROUP: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Program (row): groups, then tokens. BLOCKS_2, PICKED and AT_ONCE are powers of two, PICKED at least width."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_2)
    tops = tl.load(totals + (row * BLOCKS + block) * 2, mask=block < BLOCKS, other=float("-inf"))
    sums = tl.load(totals + (row * BLOCKS + block) * 2 + 1, mask=block < BLOCKS, other=0.0)
    top = tl.max(tops, 0)
    is_wrong = top == float("inf")
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    log_total = tl.log(tl.sum(sums * tl.exp(tops - base), 0))

    group = tl.arange(0, AT_ONCE)
    own = largest + row * GROUPS
    best = tl.topk(_keys(tl.load(own + group, mask=group < GROUPS, other=float("-inf")), group), PICKED)
    for first in range(AT_ONCE, GROUPS, AT_ONCE):
        more = group + first
        keys = _keys(tl.load(own + more, mask=more < GROUPS, other=float("-inf")), more)
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(keys, PICKED)), (2 * PICKED,)), PICKED)

    column = _ids(best)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = logits + tl.load(logits_row + row).to(tl.int64) * logits_stride + column
    value = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
    is_allowed = column < tl.load(num_tokens + row)
    if tl.load(is_normalized + row) == 0:
        is_allowed &= column < tl.load(num_columns + row)
    if bitmask is not None:
        mask = tl.load(mask_row + row).to(tl.int64)
        num_words = tl.where(mask >= 0, words, 0)
        word = column >> 5
        bits = tl.load(bitmask + mask * mask_stride + word, mask=word < num_words, other=0)
        is_allowed &= ((tl.where(mask >= 0, bits, -1) >> (column & 31)) & 1) != 0
    value = tl.where(is_wrong, float("-inf"), tl.where(is_allowed, value, float("-inf")))
    keys = tl.reshape(_keys(value, column), (PICKED * GROUP,))
    best = tl.topk(keys, PICKED)
    value = _values(best)
    is_found = value > float("-inf")
    place = tl.arange(0, PICKED)
    out = row * width + place
    tl.store(scores + out, tl.where(is_found, value - base - log_total, float("-inf")), mask=place < width)
    tl.store(tokens + out, tl.where(is_found, _ids(best), -1), mask=place < width)
    found = tl.max(is_found.to(tl.int32), 0)
    tl.store(status + row, tl.where(is_wrong, 2, 1 - found))


@triton.jit
def _keys(value, number):  # type: ignore[no-untyped-def]
    """int64 that are ordered as float32 `value`, and where that is equal against `number` (int32, not negative)."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def _ids(keys):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _values(keys):  # type: ignore[no-untyped-def]
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
