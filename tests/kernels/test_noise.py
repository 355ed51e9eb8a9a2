import numpy as np
import torch
from scipy import stats

from cadenza.kernels.noise import gumbel, philox, random_words, uniform


def numpy_philox(seed: int, counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Written from the paper with Python's unbounded integers."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    c = list(counter)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_equals_unbounded_integer_arithmetic():
    rng = np.random.default_rng(0)
    for _ in range(50):
        seed = int(rng.integers(0, 2**63))
        counter = tuple(int(v) for v in rng.integers(0, 2**32, size=4))
        words = philox(torch.tensor([seed]), tuple(torch.tensor([v]) for v in counter))
        assert [int(word) for word in words] == numpy_philox(seed, counter)


def test_a_rows_coin_has_a_counter_of_its_own():
    """The layout is part of what a seed means."""
    for seed, branch, position in [(1, 0, 0), (2**40 + 3, 5, 77), (2**63 - 1, 127, 8191)]:
        coin = uniform(torch.tensor([seed]), torch.tensor([branch]), torch.tensor([position]))
        assert coin == (numpy_philox(seed, (0, position, branch, 1))[0] + 0.5) / 2**32


def test_a_tokens_word_does_not_depend_on_which_tokens_are_asked_for():
    seed, branch, position = torch.tensor([[7]]), torch.tensor([[2]]), torch.tensor([[31]])
    everything = random_words(seed, branch, position, torch.arange(10_000).unsqueeze(0))
    some = torch.tensor([[0, 1023, 1024, 4095, 4096, 9_999, 5]])
    assert torch.equal(random_words(seed, branch, position, some), everything[:, some[0]])


def test_seed_branch_and_position_each_change_the_noise():
    token = torch.arange(100).unsqueeze(0)
    one, two = torch.tensor([[1]]), torch.tensor([[2]])
    base = random_words(one, one, one, token)
    for other in (random_words(two, one, one, token), random_words(one, two, one, token)):
        assert not torch.equal(base, other)
    assert not torch.equal(base, random_words(one, one, two, token))


def test_noise_follows_the_gumbel_distribution():
    one = torch.tensor([[1]])
    noise = gumbel(random_words(one, one, one, torch.arange(200_000).unsqueeze(0)))[0]
    # A correct generator fails this with probability 1e-4; the seed is fixed, so it never flickers.
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 1e-4


def test_both_tails_stay_finite():
    assert torch.isfinite(gumbel(torch.tensor([0, 1, 2**32 - 1]))).all()
