"""`sample` against exact distributions: written again in float64 numpy here, and by transformers' logits warpers.

A chi-square test of a correct sampler fails with probability 1e-4. There are about 30, so a change that draws other
(correct) numbers would fail some test once in 300 tries; with fixed seeds an unchanged sampler never flickers.
"""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from cadenza.kernels.noise import all_words, gumbel, random_words
from cadenza.kernels.sampling import SamplingRows, divide_by_temperature, sample, truncate

FALSE_ALARM = 1e-4
OFF: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 7},
    "top-k 1": {"top_k": 1},
    "top-k beyond the vocabulary": {"top_k": 100_000},
    "top-p": {"top_p": 0.8},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.1},
    "min-p 1": {"min_p": 1.0},
    "typical": {"typical_p": 0.6},
    "nearly everything typical": {"typical_p": 0.97},
    "top-k, top-p": {"top_k": 12, "top_p": 0.7},
    "top-k, min-p, hot": {"top_k": 15, "min_p": 0.2, "temperature": 1.5},
    "top-p, min-p": {"top_p": 0.9, "min_p": 0.05},
    "typical, top-p": {"typical_p": 0.8, "top_p": 0.75},
    "typical, min-p": {"typical_p": 0.7, "min_p": 0.3},
    "everything": {"temperature": 1.3, "top_k": 18, "typical_p": 0.9, "top_p": 0.85, "min_p": 0.08},
}


def vocabularies() -> dict[str, Tensor]:
    """Logits of single distributions. The large ones need more than the 256 candidates, or just fewer."""
    generator = torch.Generator().manual_seed(5)

    def normal(size: int, spread: float) -> Tensor:
        return torch.randn(size, generator=generator) * spread

    masked = normal(40, 1.5)
    masked[torch.arange(0, 40, 3)] = -torch.inf
    return {
        "20 tokens": normal(20, 1.5),
        "50 tokens": normal(50, 2.0),
        "some forbidden": masked,
        "5000 tokens, flat": normal(5000, 0.5),
        "5000 tokens, peaked": normal(5000, 2.5),
    }


LOGITS = vocabularies()


def rows_of(count: int, settings: dict[str, float], *, seed: int = 0) -> SamplingRows:
    """`count` rows with equal parameters, told apart by their positions and branches."""
    values = OFF | settings

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype)

    return SamplingRows(
        temperature=column(values["temperature"], torch.float32),
        top_k=column(values["top_k"], torch.int64),
        top_p=column(values["top_p"], torch.float32),
        min_p=column(values["min_p"], torch.float32),
        typical_p=column(values["typical_p"], torch.float32),
        seed=column(seed, torch.int64),
        branch=torch.arange(count) % 7,
        position=torch.arange(count) // 7,
    )


def exact_probs(logits: Tensor, settings: dict[str, float]) -> np.ndarray[Any, Any]:
    """The distribution that the definitions of the papers give, one truncation after the other, in float64."""
    values = OFF | settings
    scaled = logits.numpy().astype(np.float64) / values["temperature"]
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if values["top_k"] > 0:
        probs = keep(probs, np.argsort(-probs)[: int(values["top_k"])])
    if values["typical_p"] < 1:
        positive = probs[probs > 0]
        entropy = -(positive * np.log(positive)).sum()
        with np.errstate(divide="ignore"):
            probs = nucleus(probs, np.argsort(np.abs(-np.log(probs) - entropy)), values["typical_p"])
    if values["top_p"] < 1:
        probs = nucleus(probs, np.argsort(-probs), values["top_p"])
    return keep(probs, np.flatnonzero(probs >= values["min_p"] * probs.max()))


def keep(probs: np.ndarray[Any, Any], chosen: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    kept = np.zeros_like(probs)
    kept[chosen] = probs[chosen]
    return kept / kept.sum()


def nucleus(probs: np.ndarray[Any, Any], order: np.ndarray[Any, Any], mass: float) -> np.ndarray[Any, Any]:
    """The shortest beginning of `order` that holds at least `mass`."""
    length = int(np.searchsorted(np.cumsum(probs[order]), mass)) + 1
    return keep(probs, order[:length])


def warped_probs(logits: Tensor, settings: dict[str, float]) -> Tensor:
    values = OFF | settings
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(values["temperature"]))])
    if values["top_k"] > 0:
        warpers.append(TopKLogitsWarper(int(values["top_k"])))
    if values["typical_p"] < 1:
        warpers.append(TypicalLogitsWarper(values["typical_p"]))
    if values["top_p"] < 1:
        warpers.append(TopPLogitsWarper(values["top_p"]))
    if values["min_p"] > 0:
        warpers.append(MinPLogitsWarper(values["min_p"]))
    warped: Tensor = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None])
    return warped[0].softmax(-1)


def truncated_probs(logits: Tensor, settings: dict[str, float]) -> Tensor:
    """What `truncate` leaves, as a distribution over the vocabulary."""
    ((_, candidates, values),) = truncate(logits[None], rows_of(1, settings), torch.tensor([True]))
    left = torch.full_like(logits, -torch.inf).scatter(0, candidates[0], values[0])
    return left.double().softmax(-1)


TIED: dict[str, dict[str, float]] = {
    "top-k": {"top_k": 7},
    "top-k that ends with a group": {"top_k": 9},
    "top-p": {"top_p": 0.4},
    "top-k, top-p": {"top_k": 100, "top_p": 0.7},
    "top-k, min-p": {"top_k": 30, "min_p": 0.3},
    "min-p": {"min_p": 0.5},
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("width", [9, 300])
def test_equal_tokens_stay_or_go_together(width: int, name: str):
    """Groups of `width` tokens of the same logit: more than the candidates that are tried first, with 300. What is
    kept is what the definition says, group by group."""
    settings = OFF | TIED[name]
    levels = torch.tensor([2.0, 1.7, 1.0, 0.5, 0.0, -1.0, -3.0])
    logits = levels.repeat_interleave(width)[
        torch.randperm(7 * width, generator=torch.Generator().manual_seed(2))
    ]
    masses = width * (levels.double() - 2.0).exp()
    num_above = torch.arange(7) * width
    is_kept = num_above < (settings["top_k"] or 7 * width)
    is_kept &= (masses.cumsum(0) - masses < settings["top_p"] * masses[is_kept].sum()) | (
        settings["top_p"] == 1
    )
    is_kept &= (levels.double() - 2.0).exp() >= settings["min_p"]
    expected = set(levels[is_kept].tolist())
    assert 1 <= len(expected) < 7
    ((_, candidates, values),) = truncate(logits[None], rows_of(1, settings), torch.tensor([True]))
    kept = candidates[0][values[0] > -torch.inf]
    assert len(kept) == len(expected) * width
    assert set(logits[kept].tolist()) == expected


def draw(logits: Tensor, settings: dict[str, float], count: int, *, seed: int = 0) -> Tensor:
    """`count` draws, in pieces that fit a processor's cache."""
    rows = rows_of(count, settings, seed=seed)
    pieces = torch.arange(count).split(128)
    return torch.cat([sample(logits.expand(len(piece), -1), rows.select(piece)) for piece in pieces])


def chi_square(tokens: Tensor, probs: np.ndarray[Any, Any]) -> float:
    """The p-value of these draws; tokens that are expected fewer than 10 times are counted as one."""
    counts = np.bincount(tokens.numpy(), minlength=len(probs))
    expected = probs * len(tokens)
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return 1.0 if len(wanted) == 1 else float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocabulary", LOGITS)
def test_truncation_equals_the_definition_and_transformers(vocabulary: str, name: str):
    logits, settings = LOGITS[vocabulary], SETTINGS[name]
    exact = exact_probs(logits, settings)
    np.testing.assert_allclose(warped_probs(logits, settings).numpy(), exact, atol=1e-6)
    np.testing.assert_allclose(truncated_probs(logits, settings).numpy(), exact, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocabulary", ["20 tokens", "some forbidden"])
def test_draws_follow_the_exact_distribution(vocabulary: str, name: str):
    logits, settings = LOGITS[vocabulary], SETTINGS[name]
    probs = exact_probs(logits, settings)
    tokens = draw(logits, settings, 12_000)
    assert probs[tokens.numpy()].min() > 0, "a token was drawn that truncation forbids"
    assert chi_square(tokens, probs) > FALSE_ALARM


@pytest.mark.parametrize("name", ["plain", "top-p", "typical", "everything"])
def test_draws_from_a_large_flat_vocabulary(name: str):
    """Of 5000 tokens hundreds or thousands are kept: more than the candidates that are tried first."""
    logits, settings = LOGITS["5000 tokens, flat"], SETTINGS[name]
    probs = exact_probs(logits, settings)
    tokens = torch.cat([draw(logits, settings, 400, seed=seed) for seed in range(12)])
    assert probs[tokens.numpy()].min() > 0
    # Single tokens are too rare to count: 50 groups of tokens of similar probability.
    group = np.argsort(np.argsort(-probs)) * 50 // len(probs)
    grouped = np.bincount(group, weights=probs, minlength=50)
    assert chi_square(torch.from_numpy(group)[tokens], grouped) > FALSE_ALARM


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    """Rows with all settings, greedy ones among them, in one batch, in the reverse of it, and one by one."""
    generator = torch.Generator().manual_seed(9)
    settings = [*SETTINGS.values(), {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}] * 4
    for vocab_size in (33, 5000):
        logits = torch.randn(len(settings), vocab_size, generator=generator)
        rows = stacked(settings)
        together = sample(logits, rows)
        backwards = torch.arange(len(settings) - 1, -1, -1)
        assert torch.equal(sample(logits[backwards], rows.select(backwards)), together[backwards])
        alone = [sample(logits[i : i + 1], rows.select(torch.tensor([i]))) for i in range(len(settings))]
        assert torch.equal(torch.cat(alone), together)
        greedy = rows.temperature == 0
        assert torch.equal(together[greedy], logits.argmax(-1)[greedy])


def stacked(settings: list[dict[str, float]]) -> SamplingRows:
    parts = [rows_of(1, each, seed=number) for number, each in enumerate(settings)]
    names = [name for name in SamplingRows.__dataclass_fields__ if name != "thresholds"]
    return SamplingRows(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def test_logits_are_left_as_they_were():
    logits = torch.stack([LOGITS["50 tokens"]] * len(SETTINGS))
    before = logits.clone()
    sample(logits, stacked(list(SETTINGS.values())))
    assert torch.equal(logits, before)


def test_truncation_that_cuts_nothing_draws_what_no_truncation_draws():
    """The noise of a token does not depend on how the row is computed."""
    logits = LOGITS["5000 tokens, flat"]
    free = draw(logits, {}, 200)
    assert torch.equal(draw(logits, {"top_k": 5000}, 200), free)
    assert torch.equal(draw(logits, {"min_p": 1e-9}, 200), free)


@pytest.mark.parametrize("vocab_size", [1, 20, 1023, 1024, 1025, 4096, 4097, 9000])
def test_all_words_equals_random_words(vocab_size: int):
    seed, branch, position = (
        torch.tensor([3, -(2**63), 2**63 - 1]),
        torch.tensor([0, 1, 2]),
        torch.tensor([9, 8, 7]),
    )
    one_by_one = random_words(
        seed[:, None], branch[:, None], position[:, None], torch.arange(vocab_size)[None, :]
    )
    assert torch.equal(all_words(seed, branch, position, vocab_size), one_by_one)


def test_a_rare_token_is_drawn_as_often_as_it_should():
    """Probability 1e-3 beside a nearly certain one: 40 expected in 40 000; a correct sampler leaves 15 … 75 less
    than once in 100 000 times."""
    logits = torch.tensor([np.log(0.999), np.log(0.001)], dtype=torch.float32)
    assert 15 <= int((draw(logits, {"top_k": 2}, 40_000) == 1).sum()) <= 75


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5])
def test_leaving_out_what_cannot_be_drawn_changes_no_draw(share: float) -> None:
    """Rows under a constraint: few tokens have finite logits, and noise is made for those alone."""
    torch.manual_seed(4)
    logits = torch.randn(7, 5003) * 4
    logits[torch.rand(7, 5003) > share] = -torch.inf
    logits[:, 7] = 0.0
    rows = SamplingRows(
        temperature=torch.full((7,), 0.9),
        top_k=torch.zeros(7, dtype=torch.int64),
        top_p=torch.ones(7),
        min_p=torch.zeros(7),
        typical_p=torch.ones(7),
        seed=torch.arange(7) * 2**40,
        branch=torch.zeros(7, dtype=torch.int64),
        position=torch.arange(7),
    )
    words = all_words(rows.seed, rows.branch, rows.position, 5003)
    expected = (divide_by_temperature(logits, rows.temperature) + gumbel(words)).argmax(dim=-1)
    assert sample(logits, rows).tolist() == expected.tolist()
    alone = [int(sample(logits[i : i + 1], rows.select(torch.tensor([i])))) for i in range(7)]
    assert alone == expected.tolist()
