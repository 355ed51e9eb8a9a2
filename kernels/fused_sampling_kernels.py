"""The two Triton kernels of `fused_sampling`, which states what they compute; launched by nobody else.

The first reads the vocabulary once, a block of 4096 tokens per program: the block's largest value, the mass where top-p
needs it, and the block's best token. The best is that of the smallest time E / e, with e = exp((x - block max) / T) and
E = -log(1 - u) the exponential variable of which the Gumbel noise is -log(E): argmax (s + g) as a race. Since E >= u,
u / e, which costs no logarithm, names the few tokens that can win, and only theirs is computed.

The second has one program per row. It compares the blocks' best tokens, by s + g as written, and is done unless the
row has a filter. With one, K is an upper set: whatever lies above a token of K lies in K. So a token that is the best
of a superset {x > v} of K, and lies in K, is the best of K. Candidates are therefore tried, each the best of what lies
above the last one: FlashInfer's rejection sampling (2025) with noise that stays the same, so that how many rounds it
takes does not decide the answer. A trial is one scan for count and mass above the candidate, which leaves out blocks
whose maximum is not. Where top-p follows top-k, the mass Z of the top-k set is bracketed by bisection between values
that occur, each scan halving their distance, only until it decides on the candidate: the set is never sorted.

Sums are over the same tiles in the same order whatever the batch holds, so a row's answer is a function of the row.
"""

import triton
import triton.language as tl

from cadenza.kernels.fused_sampling_tiles import (
    BLOCK,
    GROUP,
    INFINITY,
    LOG2_E,
    NO_TOKEN,
    QUARTER,
    allowed_quarters,
    best_of_block,
    bounded_temperature,
    cut_quarters,
    first_place,
    largest_or_infinity,
    load_quarters,
    noisy_score,
    raw_statistics,
    word_of,
)

_OF_ROWS = [
    *("bitmask", "mask_stride", "num_words", "logits_rows", "edited_rows", "mask_rows"),
    *("nums_tokens", "nums_columns"),
    *("temperatures", "top_ps", "seeds", "branches", "positions"),
    *("maxima", "masses", "best", "raw_maxima", "raw_masses"),
]
"""Read number by number, and perhaps parts of larger tensors: where they lie in memory must compile nothing anew."""
_SMALLEST_SHARE: tl.constexpr = tl.constexpr(2.0**-100)
_REACH: tl.constexpr = tl.constexpr(40.0)
"""exp(-40) of a vocabulary of 2^31 is below the rounding of the mass of the most likely token."""


@triton.jit(do_not_specialize=_OF_ROWS)  # type: ignore[untyped-decorator]
def _blocks_kernel(  # type: ignore[no-untyped-def]
    logits, logits_stride, logits_size, edited, edited_stride, edited_size, bitmask, mask_stride, num_words,
    logits_rows, edited_rows, mask_rows, nums_tokens, nums_columns, temperatures, top_ps, seeds, branches, positions,
    maxima, masses, best, raw_maxima, raw_masses,
    RAGGED: tl.constexpr, WANTS_LOGPROBS: tl.constexpr,
):  # fmt: skip
    """Program (row, block)."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    start = block * BLOCK
    out = row * tl.num_programs(1) + block
    raw = logits + tl.load(logits_rows + row).to(tl.int64) * logits_stride
    edited_row = tl.load(edited_rows + row)
    own = edited + edited_row.to(tl.int64) * edited_stride
    is_edited = edited_row >= 0
    if WANTS_LOGPROBS:
        x0, x1, x2, x3 = load_quarters(raw, start, logits_size, RAGGED)
        largest, mass = raw_statistics(x0, x1, x2, x3, start, tl.load(nums_columns + row))
        tl.store(raw_maxima + out, largest)
        tl.store(raw_masses + out, mass)
        if is_edited:
            x0, x1, x2, x3 = load_quarters(own, start, edited_size, RAGGED)
    elif is_edited:
        x0, x1, x2, x3 = load_quarters(own, start, edited_size, RAGGED)
    else:
        x0, x1, x2, x3 = load_quarters(raw, start, logits_size, RAGGED)
    mask_row = tl.load(mask_rows + row)
    x0, x1, x2, x3 = allowed_quarters(
        x0, x1, x2, x3, bitmask, mask_row, mask_stride, num_words, start, tl.load(nums_tokens + row)
    )
    largest = largest_or_infinity(x0, x1, x2, x3)
    tl.store(maxima + out, largest)
    token = 0
    if (largest > -INFINITY) & (largest < INFINITY):
        temperature = tl.load(temperatures + row)
        if temperature == 0:
            token = first_place(x0 == largest, x1 == largest, x2 == largest, x3 == largest)
        else:
            inverse = 1.0 / bounded_temperature(temperature)
            scale = inverse * LOG2_E
            if tl.load(top_ps + row) < 1:
                e = tl.exp2((x0 - largest) * scale) + tl.exp2((x1 - largest) * scale)
                e += tl.exp2((x2 - largest) * scale) + tl.exp2((x3 - largest) * scale)
                tl.store(masses + out, tl.sum(e))
            seed = tl.load(seeds + row)
            token = best_of_block(
                *(
                    x0,
                    x1,
                    x2,
                    x3,
                    largest,
                    inverse,
                    seed,
                    tl.load(branches + row),
                    tl.load(positions + row),
                    block,
                ),
                *(raw, own, is_edited),
            )
    tl.store(best + out, start + token)


@triton.jit(do_not_specialize=[*_OF_ROWS, "top_ks", "min_ps", "tokens", "statuses", "logprobs", "ranks"])  # type: ignore[untyped-decorator]
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, logits_stride, logits_size, edited, edited_stride, edited_size, bitmask, mask_stride, num_words,
    logits_rows, edited_rows, mask_rows, nums_tokens, nums_columns, temperatures, top_ks, top_ps, min_ps,
    seeds, branches, positions,
    maxima, masses, best, raw_maxima, raw_masses, tokens, statuses, logprobs, ranks,
    NUM_BLOCKS: tl.constexpr, LANES: tl.constexpr, RAGGED: tl.constexpr, WANTS_LOGPROBS: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    row = tl.program_id(0)
    maxima += row * NUM_BLOCKS
    lane = tl.arange(0, LANES)
    block_max = tl.load(maxima + lane, mask=lane < NUM_BLOCKS, other=-INFINITY)
    largest = tl.max(block_max, 0)
    status = tl.where(largest == INFINITY, 2, tl.where(largest == -INFINITY, 1, 0))
    tl.store(statuses + row, status)
    token = -1
    raw = logits + tl.load(logits_rows + row).to(tl.int64) * logits_stride
    if status == 0:
        edited_row = tl.load(edited_rows + row)
        own = edited + edited_row.to(tl.int64) * edited_stride
        is_edited = edited_row >= 0
        temperature = tl.load(temperatures + row)
        inverse = 1.0 / bounded_temperature(temperature)
        seed = tl.load(seeds + row)
        branch = tl.load(branches + row)
        position = tl.load(positions + row)
        is_live = block_max > -INFINITY
        block_best = tl.load(best + row * NUM_BLOCKS + lane, mask=is_live, other=0)
        if is_edited:
            x = tl.load(own + block_best, mask=is_live, other=-INFINITY)
        else:
            x = tl.load(raw + block_best, mask=is_live, other=-INFINITY).to(tl.float32)
        score = x
        if temperature > 0:
            score = noisy_score(x, largest, inverse, word_of(seed, branch, position, block_best))
        token = tl.min(tl.where(is_live & (score == tl.max(score, 0)), block_best, NO_TOKEN), 0)
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
            value = tl.max(tl.where(is_live & (block_best == token), x, -INFINITY), 0)
            total = INFINITY
            if top_p < 1:
                mass = tl.load(masses + row * NUM_BLOCKS + lane, mask=is_live, other=0.0)
                total = tl.sum(mass * tl.exp2((block_max - largest) * (inverse * LOG2_E)), 0)
            token = _filtered(
                *(
                    token,
                    value,
                    total,
                    top_k,
                    top_p,
                    min_p,
                    largest,
                    inverse,
                    block_max,
                    seed,
                    branch,
                    position,
                ),
                *(
                    raw,
                    logits_size,
                    own,
                    edited_size,
                    is_edited,
                    bitmask,
                    tl.load(mask_rows + row),
                    mask_stride,
                ),
                *(num_words, tl.load(nums_tokens + row), maxima, NUM_BLOCKS, RAGGED),
            )
    tl.store(tokens + row, token)
    if WANTS_LOGPROBS:  # noqa: SIM102 — known to the compiler, unlike the other
        if status == 0:
            raw_maxima += row * NUM_BLOCKS
            raw_max = tl.load(raw_maxima + lane, mask=lane < NUM_BLOCKS, other=-INFINITY)
            raw_mass = tl.load(raw_masses + row * NUM_BLOCKS + lane, mask=lane < NUM_BLOCKS, other=0.0)
            value = tl.load(raw + token).to(tl.float32)
            tl.store(logprobs + row, _log_share(value, raw_max, raw_mass))
            num_columns = tl.load(nums_columns + row)
            tl.store(ranks + row, _rank(value, raw, logits_size, num_columns, raw_maxima, NUM_BLOCKS, RAGGED))


@triton.jit  # type: ignore[untyped-decorator]
def _filtered(  # type: ignore[no-untyped-def]
    token, value, total, top_k, top_p, min_p, largest, inverse, block_max, seed, branch, position,
    raw, logits_size, own, edited_size, is_edited, bitmask, mask_row, mask_stride, num_words, num_tokens,
    maxima, NUM_BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The token of K, from the best of all: `token`, of logit `value`. total: the mass of all, where top-p is on."""
    is_scanned = (top_k > 0) | (top_p < 1)
    is_nested = (top_k > 0) & (top_p < 1)
    k = tl.where(top_k > 0, top_k, NO_TOKEN)
    p = tl.maximum(top_p, _SMALLEST_SHARE)
    least_score = -INFINITY
    if min_p > 0:
        least_score = tl.minimum(tl.log(tl.maximum(min_p, _SMALLEST_SHARE)), 0.0)
    # What is known: Z lies in [least_z, most_z], the k-th largest value in [low, high]; below the first `low` lies
    # nothing that has mass.
    most_z = total
    least_z = tl.where(is_nested, 0.0, total)
    low = largest - _REACH / inverse
    high = largest
    probe = value
    mass_above = 0.0
    is_new = True
    is_beyond_k = False
    needs_draw = (value - largest) * inverse < least_score
    bound = -INFINITY
    is_searching = is_scanned | needs_draw
    while is_searching:
        if needs_draw:
            token, value = _draw_above(
                *(bound, least_score, largest, inverse, seed, branch, position),
                *(raw, logits_size, own, edited_size, is_edited, bitmask, mask_row, mask_stride),
                *(num_words, num_tokens, maxima, NUM_BLOCKS, RAGGED),
            )
            probe = value
            is_new = True
            needs_draw = False
            is_searching = is_scanned
        else:
            count, mass, above, below = _scan(
                *(probe, is_nested, largest, inverse, raw, logits_size, own, edited_size, is_edited),
                *(bitmask, mask_row, mask_stride, num_words, num_tokens, maxima, NUM_BLOCKS, RAGGED),
            )
            if is_new:
                is_beyond_k = count >= k
                mass_above = mass
                is_new = False
            if is_nested:
                if count >= k:
                    low = above
                    most_z = tl.minimum(most_z, mass)
                else:
                    below = tl.maximum(below, tl.max(tl.where(block_max > probe, -INFINITY, block_max), 0))
                    high = tl.minimum(high, below)
                    least = mass + tl.exp2((high - largest) * (inverse * LOG2_E))
                    least_z = tl.minimum(tl.maximum(least_z, least), most_z)
                if high <= low:
                    least_z = most_z
            is_outside = is_beyond_k | (mass_above >= p * most_z)
            if is_outside:
                bound = value
                needs_draw = True
            elif mass_above < p * least_z:
                is_searching = False
            else:
                middle = low + (high - low) * 0.5
                probe = tl.where(middle < high, middle, low)
    return token


@triton.jit  # type: ignore[untyped-decorator]
def _draw_above(  # type: ignore[no-untyped-def]
    bound, least_score, largest, inverse, seed, branch, position,
    raw, logits_size, own, edited_size, is_edited, bitmask, mask_row, mask_stride, num_words, num_tokens,
    maxima, NUM_BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(token, its logit): the best of the tokens whose logit is above `bound`, with s of at least `least_score`."""
    token = -1
    value = -INFINITY
    best_score = -INFINITY
    for number in tl.range(0, NUM_BLOCKS, disable_licm=True):
        block_largest = tl.load(maxima + number)
        block = _in_this_turn(number, block_largest)
        if (block_largest > bound) & ((block_largest - largest) * inverse >= least_score):
            x0, x1, x2, x3 = _load_block(
                *(block * BLOCK, raw, logits_size, own, edited_size, is_edited),
                *(bitmask, mask_row, mask_stride, num_words, num_tokens, RAGGED),
            )
            x0 = tl.where((x0 > bound) & ((x0 - largest) * inverse >= least_score), x0, -INFINITY)
            x1 = tl.where((x1 > bound) & ((x1 - largest) * inverse >= least_score), x1, -INFINITY)
            x2 = tl.where((x2 > bound) & ((x2 - largest) * inverse >= least_score), x2, -INFINITY)
            x3 = tl.where((x3 > bound) & ((x3 - largest) * inverse >= least_score), x3, -INFINITY)
            found = block * BLOCK + best_of_block(
                *(x0, x1, x2, x3, block_largest, inverse, seed, branch, position, block, raw, own, is_edited)
            )
            if is_edited:
                found_value = tl.load(own + found)
            else:
                found_value = tl.load(raw + found).to(tl.float32)
            score = noisy_score(found_value, largest, inverse, word_of(seed, branch, position, found))
            is_better = score > best_score  # of equal ones the first, in the order of blocks
            token = tl.where(is_better, found, token)
            value = tl.where(is_better, found_value, value)
            best_score = tl.where(is_better, score, best_score)
    return token, value


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    probe, is_nested, largest, inverse, raw, logits_size, own, edited_size, is_edited,
    bitmask, mask_row, mask_stride, num_words, num_tokens, maxima, NUM_BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(count, mass) of the logits above `probe`. And where it is_nested, the smallest of them, and the largest of the
    others in the blocks that are read: those whose maximum is above it."""
    counts = tl.zeros((QUARTER // GROUP, GROUP), tl.int32)
    masses = tl.zeros((QUARTER // GROUP, GROUP), tl.float32)
    above = INFINITY
    below = -INFINITY
    for number in tl.range(0, NUM_BLOCKS, disable_licm=True):
        block_largest = tl.load(maxima + number)
        block = _in_this_turn(number, block_largest)
        if block_largest > probe:
            x0, x1, x2, x3 = _load_block(
                *(block * BLOCK, raw, logits_size, own, edited_size, is_edited),
                *(bitmask, mask_row, mask_stride, num_words, num_tokens, RAGGED),
            )
            counts += _count(x0, x1, x2, x3, probe)
            scale = inverse * LOG2_E
            masses += tl.where(x0 > probe, tl.exp2((x0 - largest) * scale), 0.0)
            masses += tl.where(x1 > probe, tl.exp2((x1 - largest) * scale), 0.0)
            masses += tl.where(x2 > probe, tl.exp2((x2 - largest) * scale), 0.0)
            masses += tl.where(x3 > probe, tl.exp2((x3 - largest) * scale), 0.0)
            if is_nested:
                low = tl.minimum(tl.where(x0 > probe, x0, INFINITY), tl.where(x1 > probe, x1, INFINITY))
                low = tl.minimum(low, tl.where(x2 > probe, x2, INFINITY))
                above = tl.minimum(above, tl.min(tl.minimum(low, tl.where(x3 > probe, x3, INFINITY))))
                high = tl.maximum(tl.where(x0 > probe, -INFINITY, x0), tl.where(x1 > probe, -INFINITY, x1))
                high = tl.maximum(high, tl.where(x2 > probe, -INFINITY, x2))
                below = tl.maximum(below, tl.max(tl.maximum(high, tl.where(x3 > probe, -INFINITY, x3))))
    return tl.sum(counts), tl.sum(masses), above, below


@triton.jit  # type: ignore[untyped-decorator]
def _load_block(  # type: ignore[no-untyped-def]
    start, raw, logits_size, own, edited_size, is_edited,
    bitmask, mask_row, mask_stride, num_words, num_tokens, RAGGED: tl.constexpr,
):  # fmt: skip
    """What the choice is made from, as four tiles."""
    if is_edited:
        x0, x1, x2, x3 = load_quarters(own, start, edited_size, RAGGED)
    else:
        x0, x1, x2, x3 = load_quarters(raw, start, logits_size, RAGGED)
    return allowed_quarters(x0, x1, x2, x3, bitmask, mask_row, mask_stride, num_words, start, num_tokens)


@triton.jit
def _in_this_turn(number, value):  # type: ignore[no-untyped-def]
    """The number: `value` is no NaN, which the compiler does not know. So it does not compute places of tokens once for
    all turns of a loop, which would take half of all registers; nor may it by `disable_licm`."""
    return number + (value != value).to(tl.int32)


@triton.jit
def _count(x0, x1, x2, x3, probe):  # type: ignore[no-untyped-def]
    low = (x0 > probe).to(tl.int32) + (x1 > probe).to(tl.int32)
    return low + (x2 > probe).to(tl.int32) + (x3 > probe).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _rank(  # type: ignore[no-untyped-def]
    value, raw, logits_size, num_columns, raw_maxima, NUM_BLOCKS: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    counts = tl.zeros((QUARTER // GROUP, GROUP), tl.int32)
    for number in tl.range(0, NUM_BLOCKS, disable_licm=True):
        block_largest = tl.load(raw_maxima + number)
        start = _in_this_turn(number, block_largest) * BLOCK
        if block_largest > value:
            x0, x1, x2, x3 = load_quarters(raw, start, logits_size, RAGGED)
            x0, x1, x2, x3 = cut_quarters(x0, x1, x2, x3, start, num_columns)
            counts += _count(x0, x1, x2, x3, value)
    return 1 + tl.sum(counts)


@triton.jit
def _log_share(value, block_max, block_mass):  # type: ignore[no-untyped-def]
    """The logarithm of exp(value) / the sum of all, from blocks' maxima and sums of exp(x - maximum)."""
    largest = tl.max(block_max, 0)
    total = tl.sum(block_mass * tl.exp2((block_max - largest) * LOG2_E), 0)
    return (value - largest) - tl.log(total)
