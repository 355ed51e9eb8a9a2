"""Top-n-sigma, epsilon, eta, XTC, mirostat and dynamic temperature: `survivors` against each definition, followed
literally in float64, and against transformers where it has one; draws by chi-square, which a correct sampler fails
with probability 1e-4.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import EpsilonLogitsWarper, EtaLogitsWarper

from cadenza.kernels.noise import random_words, uniform
from cadenza.kernels.sampling import SamplingRows, draw, sample, survivors
from cadenza.kernels.thresholds import ThresholdRows, entropy, row_sums

FALSE_ALARM = 1e-4
OFF: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_n_sigma": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "mirostat": 0,
    "mirostat_mu": 10.0,
}
PLAIN = ("temperature", "top_k", "top_p", "min_p", "typical_p")
INTEGERS = ("top_k", "mirostat")
SETTINGS: dict[str, dict[str, float]] = {
    "one sigma": {"top_n_sigma": 1.0},
    "hot, half a sigma": {"top_n_sigma": 0.5, "temperature": 1.8},
    "no sigma at all": {"top_n_sigma": 1e-6},
    "epsilon": {"epsilon_cutoff": 0.01},
    "epsilon above all": {"epsilon_cutoff": 0.99},
    "eta": {"eta_cutoff": 0.05},
    "large eta": {"eta_cutoff": 0.5},
    "XTC": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "XTC of everything": {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    "XTC of nothing": {"xtc_probability": 1.0, "xtc_threshold": 0.51},
    "mirostat 2": {"mirostat": 2, "mirostat_mu": 4.0},
    "mirostat 2, less than any": {"mirostat": 2, "mirostat_mu": -1.0},
    "mirostat 1": {"mirostat": 1, "mirostat_mu": 3.0},
    "mirostat 1, hardly anything": {"mirostat": 1, "mirostat_mu": -30.0},
    "mirostat 1, everything": {"mirostat": 1, "mirostat_mu": 1000.0},
    "dynamic temperature": {"dynatemp_range": 0.8, "dynatemp_exponent": 1.7},
    "dynamic, from zero on": {"temperature": 1.3, "dynatemp_range": 1.3, "dynatemp_exponent": 0.5},
    "sigma, epsilon, eta": {"top_n_sigma": 1.5, "epsilon_cutoff": 0.01, "eta_cutoff": 0.1},
    "top-k, XTC": {"top_k": 12, "xtc_probability": 1.0, "xtc_threshold": 0.08},
    "min-p, mirostat 2": {"min_p": 0.05, "mirostat": 2, "mirostat_mu": 3.0},
    "top-k, mirostat 1": {"top_k": 15, "mirostat": 1, "mirostat_mu": 2.0},
    "everything": {
        "temperature": 1.2,
        "dynatemp_range": 0.4,
        "top_n_sigma": 1.8,
        "epsilon_cutoff": 0.003,
        "eta_cutoff": 0.02,
        "top_k": 18,
        "top_p": 0.97,
        "min_p": 0.02,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.2,
        "mirostat": 2,
        "mirostat_mu": 4.5,
    },
}


def vocabularies() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    masked = torch.randn(60, generator=generator) * 1.5
    masked[torch.arange(0, 60, 3)] = -torch.inf
    only_one = torch.full((30,), -torch.inf)
    only_one[17] = -3.0
    return {
        "40 tokens": torch.randn(40, generator=generator) * 1.7,
        "some forbidden": masked,
        "one allowed": only_one,
        "700 tokens": torch.randn(700, generator=generator) * 2.5,
    }


LOGITS = vocabularies()


def rows_of(settings: list[dict[str, float]], *, seed: int = 0) -> SamplingRows:
    """Rows told apart by their positions and branches."""
    every = [OFF | each for each in settings]

    def column(name: str) -> Tensor:
        dtype = torch.int64 if name in INTEGERS else torch.float32
        return torch.tensor([each[name] for each in every], dtype=dtype)

    count = len(every)
    return SamplingRows(
        **{name: column(name) for name in PLAIN},
        seed=torch.full((count,), seed),
        branch=torch.arange(count) % 7,
        position=torch.arange(count) // 7,
        thresholds=ThresholdRows(**{name: column(name) for name in OFF if name not in PLAIN}),
    )


def left_over(logits: Tensor, settings: dict[str, float]) -> np.ndarray[Any, Any]:
    """The distribution that is drawn from."""
    (group,) = survivors(logits[None], rows_of([settings]), torch.tensor([True]))
    if group.candidates is None:
        return group.values[0].double().softmax(-1).numpy()
    left = torch.full_like(logits, -torch.inf).scatter(0, group.candidates[0], group.values[0])
    return left.double().softmax(-1).numpy()


def by_definition(logits: Tensor, settings: dict[str, float]) -> np.ndarray[Any, Any]:
    """One step after the other over a list of (probability, token), in float64, as llama.cpp does it."""
    own = OFF | settings
    allowed = [token for token, logit in enumerate(logits.tolist()) if logit > -np.inf]
    values = logits.double().numpy()[allowed]
    temperature = own["temperature"]
    if own["dynatemp_range"] > 0 and len(values) > 1:
        probs = softmax(values)
        share = -(probs * np.log(probs)).sum() / np.log(len(values))
        low, high = max(0, temperature - own["dynatemp_range"]), temperature + own["dynatemp_range"]
        temperature = low + (high - low) * share ** own["dynatemp_exponent"]
    values = values / temperature
    if own["top_n_sigma"] > 0:
        values = np.where(values >= values.max() - own["top_n_sigma"] * values.std(), values, -np.inf)
    if own["epsilon_cutoff"] > 0:
        values = cut(values, softmax(values) >= own["epsilon_cutoff"])
    if own["eta_cutoff"] > 0:
        probs, epsilon = softmax(values), own["eta_cutoff"]
        positive = probs[probs > 0]
        nats = -(positive * np.log(positive)).sum()
        values = cut(values, probs >= min(epsilon, epsilon**0.5 * np.exp(-nats)))
    probs = softmax(values)
    tokens = sorted((each for each in range(len(probs)) if probs[each] > 0), key=lambda each: -probs[each])
    tokens = tokens[: int(own["top_k"]) or None]
    if own["top_p"] < 1:
        mass = np.cumsum(probs[tokens] / probs[tokens].sum())
        tokens = tokens[: int((mass < own["top_p"]).sum()) + 1]
    tokens = [each for each in tokens if probs[each] >= own["min_p"] * probs[tokens[0]]]
    if own["xtc_probability"] == 1 and own["xtc_threshold"] <= 0.5:
        share_of = probs[tokens] / probs[tokens].sum()
        tokens = tokens[max(int((share_of >= own["xtc_threshold"]).sum()) - 1, 0) :]
    if own["mirostat"]:
        keep = mirostat_1 if own["mirostat"] == 1 else mirostat_2
        tokens = tokens[: keep(probs[tokens] / probs[tokens].sum(), own["mirostat_mu"], len(logits))]
    result = np.zeros(len(logits))
    result[[allowed[each] for each in tokens]] = probs[tokens] / probs[tokens].sum()
    return result


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def cut(values: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(kept | (values == values.max()), values, -np.inf)


def mirostat_1(probs: np.ndarray[Any, Any], mu: float, vocab_size: int) -> int:
    if len(probs) == 1:
        return 1
    above = below = 0.0
    for rank, (one, following) in enumerate(itertools.pairwise(probs[:100])):
        step = np.log((rank + 2) / (rank + 1))
        above += step * np.log(one / following)
        below += step**2
    exponent = above / below
    excess = exponent - 1
    with np.errstate(over="ignore"):
        k = (excess * np.float64(2) ** mu / (1 - float(vocab_size) ** -excess)) ** (1 / exponent)
    return int(np.clip(k, 1, len(probs)))


def mirostat_2(probs: np.ndarray[Any, Any], mu: float, vocab_size: int) -> int:
    return max(int((-np.log2(probs) <= mu).sum()), 1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocabulary", LOGITS)
def test_what_is_left_is_what_the_definitions_leave(vocabulary: str, name: str):
    logits, settings = LOGITS[vocabulary], SETTINGS[name]
    left, expected = left_over(logits, settings), by_definition(logits, settings)
    assert ((left > 0) == (expected > 0)).all()
    np.testing.assert_allclose(left, expected, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-4, 3e-3, 0.1, 0.6])
@pytest.mark.parametrize("vocabulary", LOGITS)
def test_cutoffs_equal_those_of_transformers(vocabulary: str, epsilon: float):
    logits = LOGITS[vocabulary]
    no_ids = torch.zeros(1, 1, dtype=torch.int64)
    by_epsilon = EpsilonLogitsWarper(epsilon)(no_ids, logits[None])[0].double().softmax(-1).numpy()
    by_eta = EtaLogitsWarper(epsilon)(no_ids, logits[None])[0].double().softmax(-1).numpy()
    np.testing.assert_allclose(left_over(logits, {"epsilon_cutoff": epsilon}), by_epsilon, atol=1e-6)
    np.testing.assert_allclose(left_over(logits, {"eta_cutoff": epsilon}), by_eta, atol=1e-6)


def test_sigmas_are_the_same_at_every_temperature():
    logits = LOGITS["700 tokens"]
    base = left_over(logits, {"top_n_sigma": 1.0}) > 0
    for temperature in (0.05, 20.0, 1e30):
        left = left_over(logits, {"top_n_sigma": 1.0, "temperature": temperature}) > 0
        assert (left == base).all()


def test_of_equally_likely_top_choices_the_first_token_stays():
    logits = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0])
    for more in ({}, {"top_k": 5}, {"top_k": 3}):
        left = left_over(logits, {"xtc_probability": 1.0, "xtc_threshold": 0.2} | more)
        assert left[1] > 0
        assert left[2] == left[4] == 0


@pytest.mark.parametrize("mu", [2.5, 4.0, 5.5, 7.5])
def test_mirostat_estimates_the_exponent_from_a_hundred_tokens(mu: float):
    """Here the first fifty have another one than the hundred, and those than all."""
    ranks = torch.arange(300)
    logits = (
        -0.7 * torch.log(ranks + 1.0) - 0.3 * (ranks - 50).clamp(0, 40) - 0.2 * (ranks - 120).clamp_min(0)
    )
    left = left_over(logits, {"mirostat": 1, "mirostat_mu": mu})
    assert (left > 0).sum() == mirostat_1(softmax(logits.double().numpy()), mu, 300)


def test_what_is_left_is_drawn_however_unlikely_it_was():
    """Noise is only made for tokens that can win against the most likely one: against the one that is left."""
    logits = torch.tensor([0.0, 90.0, 30.0])
    for more in ({}, {"top_k": 3}):
        rows = rows_of([{"xtc_probability": 1.0, "xtc_threshold": 1e-30} | more] * 20)
        assert sample(logits.expand(20, -1), rows).tolist() == [2] * 20


@pytest.mark.parametrize(
    "more",
    [
        {"top_n_sigma": 2.0},
        {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"mirostat": 1},
        {"mirostat": 2},
        {"dynatemp_range": 1.0},
    ],
)
@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-40, 1e-45])
def test_nearly_no_temperature_is_greedy(temperature: float, more: dict[str, float]):
    logits = LOGITS["some forbidden"]
    more = {name: temperature if name == "dynatemp_range" else value for name, value in more.items()}
    rows = rows_of([{"temperature": temperature} | more] * 8)
    assert sample(logits.expand(8, -1), rows).tolist() == [int(logits.argmax())] * 8


DRAWN = {
    "sigma": {"top_n_sigma": 1.2},
    "epsilon, eta": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.2},
    "XTC": {"xtc_probability": 1.0, "xtc_threshold": 0.06},
    "XTC, top-k": {"xtc_probability": 1.0, "xtc_threshold": 0.06, "top_k": 9},
    "mirostat 2": {"mirostat": 2, "mirostat_mu": 4.2},
    "mirostat 1": {"mirostat": 1, "mirostat_mu": 3.0},
    "dynamic": {"dynatemp_range": 0.7, "dynatemp_exponent": 1.2},
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("vocabulary", ["40 tokens", "some forbidden"])
def test_draws_follow_the_distribution(vocabulary: str, name: str):
    logits, settings = LOGITS[vocabulary], DRAWN[name]
    assert chi_square(draws(logits, settings, 6_000), by_definition(logits, settings)) > FALSE_ALARM


@pytest.mark.parametrize("probability", [0.25, 0.8])
def test_xtc_excludes_as_often_as_it_should(probability: float):
    """The coin and the noise are independent: draws follow the mixture of both distributions."""
    logits, settings = LOGITS["40 tokens"], {"xtc_threshold": 0.06}
    always = by_definition(logits, settings | {"xtc_probability": 1.0})
    mixture = probability * always + (1 - probability) * by_definition(logits, {})
    tokens = draws(logits, settings | {"xtc_probability": probability}, 8_000)
    assert chi_square(tokens, mixture) > FALSE_ALARM


def draws(logits: Tensor, settings: dict[str, float], count: int) -> Tensor:
    rows = rows_of([settings] * count)
    pieces = torch.arange(count).split(256)
    return torch.cat([sample(logits.expand(len(piece), -1), rows.select(piece)) for piece in pieces])


def chi_square(tokens: Tensor, probs: np.ndarray[Any, Any]) -> float:
    """The p-value; tokens that are expected fewer than 10 times are counted as one."""
    counts, expected = np.bincount(tokens.numpy(), minlength=len(probs)), probs * len(tokens)
    assert counts[probs == 0].sum() == 0, "a token was drawn that is cut off"
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return 1.0 if len(wanted) == 1 else float(stats.chisquare(observed, wanted).pvalue)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With which torch sums a single row of more than 32768 numbers otherwise than several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("vocab_size", "step"), [(61, 1), (1500, 1), (33_000, 3)])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab_size: int, step: int):
    """To the last bit of the surprise."""
    settings = [*SETTINGS.values(), {}, {"temperature": 0.0}, {"typical_p": 0.9}, {"typical_p": 0.8}][::step]
    settings = [each | {"xtc_probability": 0.5} if "mirostat" in each else each for each in settings]
    logits = torch.randn(len(settings), vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    rows = rows_of(settings)
    together = draw(logits, rows)
    assert together.surprise is not None
    backwards = torch.arange(len(settings) - 1, -1, -1)
    again = draw(logits[backwards], rows.select(backwards))
    assert torch.equal(again.tokens[backwards], together.tokens)
    for number in range(len(settings)):
        alone = draw(logits[number : number + 1], rows.select(torch.tensor([number])))
        assert alone.tokens[0] == together.tokens[number]
        assert alone.surprise is not None
        assert torch.equal(
            alone.surprise.nan_to_num(-1), together.surprise[number : number + 1].nan_to_num(-1)
        )


@pytest.mark.usefixtures("two_threads")
def test_sums_of_rows_do_not_depend_on_how_many_there_are():
    values = torch.randn(5, 40_001, generator=torch.Generator().manual_seed(8))
    together = row_sums(values), entropy(values.log_softmax(-1))
    for number in range(5):
        own = values[number : number + 1]
        assert torch.equal(row_sums(own)[0], together[0][number])
        assert torch.equal(entropy(own.log_softmax(-1))[0], together[1][number])
    torch.testing.assert_close(together[0].double(), values.double().sum(-1), atol=1e-3, rtol=1e-5)


def test_other_rows_draw_as_if_there_were_no_thresholds():
    logits = torch.randn(40, 900, generator=torch.Generator().manual_seed(4))
    plain = [{}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 0.0}] * 5
    mixed = rows_of([*plain, *itertools.islice(itertools.cycle(SETTINGS.values()), 20)])
    names = (*PLAIN, "seed", "branch", "position")
    without = SamplingRows(**{name: getattr(mixed, name)[:20] for name in names})
    assert draw(logits[:20], without).surprise is None
    assert torch.equal(sample(logits, mixed)[:20], sample(logits[:20], without))


def test_surprise_is_that_of_the_distribution_drawn_from():
    logits, settings = LOGITS["40 tokens"], {"mirostat": 2, "mirostat_mu": 4.0, "top_k": 20}
    drawn = draw(logits.expand(50, -1), rows_of([settings] * 50))
    expected = -np.log2(by_definition(logits, settings)[drawn.tokens.numpy()])
    assert drawn.surprise is not None
    np.testing.assert_allclose(drawn.surprise.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, 0.0, 1e30])
def test_rows_that_say_nothing_raise_nothing(value: float, name: str):
    """No token left, no numbers, all tokens alike."""
    logits = torch.full((2, 50), value)
    logits[1, :20] = torch.arange(20)
    assert all(0 <= token < 50 for token in sample(logits, rows_of([SETTINGS[name]] * 2)).tolist())


def test_the_coin_is_uniform_and_apart_from_the_noise():
    count = 20_000
    seed, branch, position = torch.full((count,), 5), torch.arange(count) % 10, torch.arange(count) // 10
    coins = uniform(seed, branch, position)
    assert stats.kstest(coins.numpy(), stats.uniform.cdf).pvalue > FALSE_ALARM
    assert len(coins.unique()) > count - 5
    noise = random_words(seed, branch, position, torch.zeros_like(seed))
    assert abs(np.corrcoef(coins.numpy(), noise.numpy())[0, 1]) < 4 / count**0.5
    alone = uniform(seed[77:78], branch[77:78], position[77:78])
    assert alone == coins[77]
