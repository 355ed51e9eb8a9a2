"""Gumbel noise as a pure function of (seed, branch, position, token), so never of the batch.

The generator is Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
the counter-based one that Triton's `tl.philox` also implements, so that a kernel and this reference agree
bit for bit. One call gives four 32-bit words, one for each quarter of a block of 4096 tokens:

    group(t) = t // 4096 * 1024 + t % 1024
    word(t)  = philox(key = seed, counter = (group(t), position, branch, 0))[t % 4096 // 1024]

This layout decides which token a seed draws. Changing it changes every seeded answer: never tune it.
"""

import torch
from torch import Tensor

QUARTER = 1024
BLOCK = 4 * QUARTER
ROUNDS = 7

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 words (held in int64) for each element.

    seed: int64, read as 64 unsigned bits. counter: four int64 tensors of uint32 values. All shapes broadcast.
    """
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so shifting and masking still yields the two unsigned halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _MASK) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ key1
        c1, c3 = product1 & _MASK, product0 & _MASK
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: Tensor, branch: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """The uint32 word (in int64) that belongs to each token; all arguments int64, shapes broadcast."""
    group = torch.div(token, BLOCK, rounding_mode="floor") * QUARTER + token % QUARTER
    first, second, third, fourth = philox(seed, (group, position, branch, torch.zeros_like(token)))
    lane = token % BLOCK // QUARTER
    return torch.where(lane < 2, torch.where(lane == 0, first, second), torch.where(lane == 2, third, fourth))


def all_words(seed: Tensor, branch: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """`random_words` of tokens 0 … vocab_size-1 for R rows, four words per call: arguments [R], result [R, vocab]."""
    num_blocks = -(-vocab_size // BLOCK)
    group = torch.arange(num_blocks * QUARTER, device=seed.device)[None, :]
    words = philox(seed[:, None], (group, position[:, None], branch[:, None], torch.zeros_like(group)))
    lanes = torch.stack([word.unflatten(1, (num_blocks, QUARTER)) for word in words], dim=2)
    return lanes.flatten(1)[:, :vocab_size]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from uint32 words: -log(E) with E exponentially distributed.

    u = (word + 1/2) / 2^32 keeps its small tail: for u < 2^-12, E = -log(1-u) = u + u²/2 to float32's
    accuracy, where 1-u would have lost the bits that let tokens of probability below 6e-8 ever be drawn.
    """
    u = (words.to(torch.float32) + 0.5) * 2.0**-32
    exponential = torch.where(u < 2.0**-12, u * (1.0 + 0.5 * u), -torch.log((1.0 - u).clamp_min(2.0**-24)))
    return -torch.log(exponential)


def uniform(seed: Tensor, branch: Tensor, position: Tensor) -> Tensor:
    """One number of (0, 1) for each row, float64: arguments [R]. The counter's fourth word keeps it apart from the
    noise of any token:

        word = philox(key = seed, counter = (0, position, branch, 1))[0]
    """
    zero = torch.zeros_like(position)
    return (philox(seed, (zero, position, branch, zero + 1))[0].double() + 0.5) * 2.0**-32
