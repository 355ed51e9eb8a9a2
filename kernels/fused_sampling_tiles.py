"""What the kernels of `fused_sampling` are made of: blocks of logits as tiles, masks, noise, and a block's best token.

A block is four tiles of 1024 tokens, [128, 8], because one call of Philox gives four words, one for each of them. A
thread holds 8 tokens side by side: a load of 16 bytes where logits have 16 bits, and one word of a bitmask. Reductions
are within one program, so their order is that of the shapes alone. Imports Triton.
"""

import triton
import triton.language as tl

from cadenza.kernels import noise

BLOCK: tl.constexpr = tl.constexpr(noise.BLOCK)
QUARTER: tl.constexpr = tl.constexpr(noise.QUARTER)
GROUP: tl.constexpr = tl.constexpr(8)
"""Tokens side by side in a thread: 16 bytes of 16-bit logits, and all in one word of a bitmask."""
_ROUNDS: tl.constexpr = tl.constexpr(noise.ROUNDS)
_FIRST_MULTIPLIER: tl.constexpr = tl.constexpr(0xD2511F53)
_SECOND_MULTIPLIER: tl.constexpr = tl.constexpr(0xCD9E8D57)
_FIRST_KEY_STEP: tl.constexpr = tl.constexpr(0x9E3779B9)
_SECOND_KEY_STEP: tl.constexpr = tl.constexpr(0xBB67AE85)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_UNIT: tl.constexpr = tl.constexpr(2.0**-32)
_SMALL: tl.constexpr = tl.constexpr(2.0**-12)
_NEAREST_TO_ONE: tl.constexpr = tl.constexpr(2.0**-24)
_SLACK: tl.constexpr = tl.constexpr(1.0 + 2.0**-9)
"""More than what a race loses to the place in its last bits, and to rounding."""
_NOT_PLACE: tl.constexpr = tl.constexpr(-noise.BLOCK)
_NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)
"""As a float32 no number: it is below no limit."""
_SMALLEST_TEMPERATURE: tl.constexpr = tl.constexpr(2.0**-120)
_LARGEST_TEMPERATURE: tl.constexpr = tl.constexpr(2.0**120)
NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def best_of_block(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, largest, inverse, seed, branch, position, block, raw, own, is_edited
):  # fmt: skip
    """Of one block the place of the token that wins; largest: finite, at least as large as any x.

    Tokens are looked at in the order of u / e, until that is beyond E / e of one that was: so is E / e of all others.
    """
    scale = inverse * LOG2_E
    group = token_ids(0, QUARTER)
    word0, word1, word2, word3 = _philox(seed, branch, position, (group + block * QUARTER).to(tl.uint32))
    race0 = _race(word0, x0, largest, scale) | group
    race1 = _race(word1, x1, largest, scale) | (group + QUARTER)
    race2 = _race(word2, x2, largest, scale) | (group + 2 * QUARTER)
    race3 = _race(word3, x3, largest, scale) | (group + 3 * QUARTER)
    key = tl.min(tl.minimum(tl.minimum(race0, race1), tl.minimum(race2, race3)))
    best = 0
    best_score = -INFINITY
    limit = INFINITY
    time = key.to(tl.float32, bitcast=True)
    while time <= limit:
        place = key & (4 * QUARTER - 1)
        token = block * (4 * QUARTER) + place
        if is_edited:
            value = tl.load(own + token)
        else:
            value = tl.load(raw + token).to(tl.float32)
        word = word_of(seed, branch, position, token)
        score = noisy_score(value, largest, inverse, word)
        is_better = (score > best_score) | ((score == best_score) & (place < best))
        best = tl.where(is_better, place, best)
        best_score = tl.where(is_better, score, best_score)
        limit = tl.minimum(limit, time * (_exponential(word) / _uniform(word)) * _SLACK)
        # The next key: as unsigned numbers, distances to those that are not above this one are the largest.
        after = key + 1
        distance = tl.minimum(
            tl.minimum((race0 - after).to(tl.uint32), (race1 - after).to(tl.uint32)),
            tl.minimum((race2 - after).to(tl.uint32), (race3 - after).to(tl.uint32)),
        )
        following = tl.min(distance).to(tl.int32)
        key = tl.where(following < 0, _NO_KEY, after + following)
        time = key.to(tl.float32, bitcast=True)
    return best


@triton.jit
def _race(word, x, largest, scale):  # type: ignore[no-untyped-def]
    """u / e as the bits of a float32, which order positive numbers, with a token's place for its last 12 bits."""
    race = (word.to(tl.float32) + 0.5) * tl.exp2((largest - x) * scale)
    return race.to(tl.int32, bitcast=True) & _NOT_PLACE


@triton.jit
def raw_statistics(x0, x1, x2, x3, start, num_columns):  # type: ignore[no-untyped-def]
    """(maximum, sum of exp(x - maximum)) of a block's first columns. NaN makes the sum NaN, and no maximum."""
    x0, x1, x2, x3 = cut_quarters(x0, x1, x2, x3, start, num_columns)
    top = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    largest = tl.max(tl.where(top == top, top, -INFINITY))
    base = tl.where(largest == -INFINITY, 0.0, largest)
    e = tl.exp2((x0 - base) * LOG2_E) + tl.exp2((x1 - base) * LOG2_E)
    e += tl.exp2((x2 - base) * LOG2_E) + tl.exp2((x3 - base) * LOG2_E)
    return largest, tl.sum(e)


@triton.jit
def largest_or_infinity(x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """+inf where there is a NaN."""
    first = tl.maximum(x0, x1, propagate_nan=tl.PropagateNan.ALL)
    second = tl.maximum(x2, x3, propagate_nan=tl.PropagateNan.ALL)
    top = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
    return tl.max(tl.where(top == top, top, INFINITY))


@triton.jit
def first_place(is0, is1, is2, is3):  # type: ignore[no-untyped-def]
    """The first place of a block where it is true."""
    group = (tl.arange(0, QUARTER // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    place = tl.where(is3, group + 3 * QUARTER, NO_TOKEN)
    place = tl.where(is2, group + 2 * QUARTER, place)
    place = tl.where(is1, group + QUARTER, place)
    return tl.min(tl.where(is0, group, place))


@triton.jit  # type: ignore[untyped-decorator]
def load_quarters(pointer, start, size, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block as four tiles of 1024, float32; -inf beyond `size`."""
    return (
        load_tile(pointer, start, size, QUARTER, RAGGED),
        load_tile(pointer, start + QUARTER, size, QUARTER, RAGGED),
        load_tile(pointer, start + 2 * QUARTER, size, QUARTER, RAGGED),
        load_tile(pointer, start + 3 * QUARTER, size, QUARTER, RAGGED),
    )


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(pointer, start, size, SIZE: tl.constexpr, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[SIZE / 8, 8]. A mask that differs inside a group of 8 would split its load: only for sizes that are RAGGED."""
    token = token_ids(start, SIZE)
    if RAGGED:
        is_inside = token < size
    else:
        first = tl.arange(0, SIZE // GROUP) * GROUP + start
        is_inside = tl.broadcast_to((first < size)[:, None], (SIZE // GROUP, GROUP))
    return tl.load(pointer + token, mask=is_inside, other=-INFINITY).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def token_ids(start, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    return (tl.arange(0, SIZE // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :] + start


@triton.jit
def allowed_quarters(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, bitmask, mask_row, mask_stride, num_words, start, num_tokens
):  # fmt: skip
    x0, x1, x2, x3 = cut_quarters(x0, x1, x2, x3, start, num_tokens)
    if mask_row >= 0:
        words = bitmask + mask_row.to(tl.int64) * mask_stride
        x0 = masked_tile(x0, words, num_words, start, QUARTER)
        x1 = masked_tile(x1, words, num_words, start + QUARTER, QUARTER)
        x2 = masked_tile(x2, words, num_words, start + 2 * QUARTER, QUARTER)
        x3 = masked_tile(x3, words, num_words, start + 3 * QUARTER, QUARTER)
    return x0, x1, x2, x3


@triton.jit
def cut_quarters(x0, x1, x2, x3, start, size):  # type: ignore[no-untyped-def]
    """-inf from token `size` on: compared only in the blocks where it ends."""
    if start + 4 * QUARTER > size:
        x0 = tl.where(token_ids(start, QUARTER) < size, x0, -INFINITY)
        x1 = tl.where(token_ids(start + QUARTER, QUARTER) < size, x1, -INFINITY)
        x2 = tl.where(token_ids(start + 2 * QUARTER, QUARTER) < size, x2, -INFINITY)
        x3 = tl.where(token_ids(start + 3 * QUARTER, QUARTER) < size, x3, -INFINITY)
    return x0, x1, x2, x3


@triton.jit  # type: ignore[untyped-decorator]
def masked_tile(x, words, num_words, start, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-inf where the bit of a token is 0, or there is none."""
    first = tl.arange(0, SIZE // GROUP) * GROUP + start
    word = tl.load(words + (first >> 5), mask=(first >> 5) < num_words, other=0)
    bit = (word[:, None] >> ((first & 31)[:, None] + tl.arange(0, GROUP)[None, :])) & 1
    return tl.where(bit != 0, x, -INFINITY)


@triton.jit
def bounded_temperature(temperature):  # type: ignore[no-untyped-def]
    """Neither it nor its inverse overflows: at both ends, distances of 1 are as good as infinite or nothing."""
    return tl.minimum(tl.maximum(temperature, _SMALLEST_TEMPERATURE), _LARGEST_TEMPERATURE)


@triton.jit
def noisy_score(x, largest, inverse, word):  # type: ignore[no-untyped-def]
    """s + g."""
    return (x - largest) * inverse - tl.log(_exponential(word))


@triton.jit
def _uniform(word):  # type: ignore[no-untyped-def]
    return (word.to(tl.float32) + 0.5) * _UNIT


@triton.jit
def _exponential(word):  # type: ignore[no-untyped-def]
    """E of `noise.gumbel`."""
    u = _uniform(word)
    return tl.where(u < _SMALL, u * (1.0 + 0.5 * u), -tl.log(tl.maximum(1.0 - u, _NEAREST_TO_ONE)))


@triton.jit
def word_of(seed, branch, position, token):  # type: ignore[no-untyped-def]
    """`noise.random_words` of a row's tokens."""
    group = (token // (4 * QUARTER)) * QUARTER + token % QUARTER
    word0, word1, word2, word3 = _philox(seed, branch, position, group.to(tl.uint32))
    quarter = token % (4 * QUARTER) // QUARTER
    low = tl.where(quarter == 0, word0, word1)
    return tl.where(quarter < 2, low, tl.where(quarter == 2, word2, word3))


@triton.jit
def _philox(seed, branch, position, group):  # type: ignore[no-untyped-def]
    """`noise.philox` with counter (group, position, branch, 0). Products of 64 bits are one instruction each."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0 = group
    c1 = position.to(tl.uint32)
    c2 = branch.to(tl.uint32)
    c3 = c2 * 0
    for _ in tl.static_range(_ROUNDS):
        product0 = c0.to(tl.uint64) * _FIRST_MULTIPLIER
        product1 = c2.to(tl.uint64) * _SECOND_MULTIPLIER
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        key0 = key0 + _FIRST_KEY_STEP
        key1 = key1 + _SECOND_KEY_STEP
    return c0, c1, c2, c3
