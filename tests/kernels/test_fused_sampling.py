"""The fused sampler against its definition in float64 numpy: in Triton's interpreter and, where there is one, a GPU."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cadenza.kernels import noise
from cadenza.kernels.fused_sampling import (
    NOT_NUMBERS,
    NOTHING_ALLOWED,
    OK,
    FusedDraws,
    FusedRows,
    fused_sampling,
    fused_sampling_bytes,
    fused_sampling_reference,
)
from cadenza.kernels.sampling import SamplingRows, sample

pytest.importorskip("triton")

Array = np.ndarray[Any, Any]
OFF: dict[str, float] = {
    **{"edited_row": -1, "mask_row": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    **{"seed": 0, "branch": 0, "position": 0},
}
KINDS = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32, "seed": torch.int64}
MIX: dict[str, list[float]] = {
    "temperature": [0.0, 0.3, 0.7, 1.0, 1.0, 1.5],
    "top_k": [0, 0, 1, 5, 40, 1000],
    "top_p": [1.0, 1.0, 0.95, 0.9, 0.5, 0.05],
    "min_p": [0.0, 0.0, 0.05, 0.3],
}


def rows_of(
    settings: list[dict[str, float]], vocab_size: int, device: torch.device | str = "cpu"
) -> FusedRows:
    """A row for each of `settings`, that of logits of the same number unless they say another."""
    columns = {}
    for item in fields(FusedRows):
        default = {"num_tokens": vocab_size, "num_columns": vocab_size, **OFF}.get(item.name)
        values = [each.get(item.name, n if default is None else default) for n, each in enumerate(settings)]
        columns[item.name] = torch.tensor(values, dtype=KINDS.get(item.name, torch.int32), device=device)
    return FusedRows(**columns)


def picked(rows: FusedRows, numbers: list[int]) -> FusedRows:
    return FusedRows(**{item.name: getattr(rows, item.name)[numbers].clone() for item in fields(FusedRows)})


def mixed(count: int, rng: np.random.Generator, **more: list[float]) -> list[dict[str, float]]:
    """Settings of all kinds beside each other."""
    return [
        {name: float(rng.choice(values)) for name, values in (MIX | more).items()}
        | {
            "seed": int(rng.integers(-(2**63), 2**63 - 1)),
            "branch": n % 3,
            "position": int(rng.integers(10**5)),
        }
        for n in range(count)
    ]


def true_noise(rows: FusedRows, row: int, size: int) -> Array:
    own = (getattr(rows, name)[row].cpu().long()[None] for name in ("seed", "branch", "position"))
    words = noise.random_words(*own, torch.arange(size)).double().numpy()
    return -np.log(-np.log1p(-(words + 0.5) / 2.0**32))


def allowed(raw: Array, edited: Tensor | None, bitmask: Tensor | None, rows: FusedRows, row: int) -> Array:
    x = np.array(raw)
    if rows.edited_row[row] >= 0:
        assert edited is not None
        x = np.full(len(raw), -np.inf)
        x[: edited.shape[1]] = edited[rows.edited_row[row]].double().cpu().numpy()
    x[int(rows.num_tokens[row]) :] = -np.inf
    if rows.mask_row[row] >= 0:
        assert bitmask is not None
        bits = np.unpackbits(bitmask[rows.mask_row[row]].cpu().numpy().view(np.uint8), bitorder="little")
        bits = np.pad(bits, (0, len(x)))[: len(x)]
        x[bits == 0] = -np.inf
    return x


def true_token(x: Array, rows: FusedRows, row: int) -> int:
    """Value by value: those above, their number and mass, and what is kept."""
    temperature, top_p, min_p = (
        float(getattr(rows, name)[row]) for name in ("temperature", "top_p", "min_p")
    )
    if temperature == 0:
        return int(x.argmax())
    values, which, counts = np.unique((x - x.max()) / temperature, return_inverse=True, return_counts=True)
    masses = counts * np.exp(values)
    num_above = np.append(np.cumsum(counts[::-1])[::-1][1:], 0)
    mass_above = np.append(np.cumsum(masses[::-1])[::-1][1:], 0.0)
    is_kept = num_above < (int(rows.top_k[row]) or len(x))
    is_kept &= mass_above < top_p * masses[is_kept].sum() if top_p < 1 else True
    is_kept &= values >= (np.log(min_p) if min_p > 0 else -np.inf)
    is_kept[-1] = True
    scores = np.where(is_kept[which], values[which] + true_noise(rows, row, len(x)), -np.inf)
    return int(scores.argmax())


def check(
    logits: Tensor,
    rows: FusedRows,
    edited: Tensor | None = None,
    bitmask: Tensor | None = None,
    *,
    wants_logprobs: bool = True,
) -> FusedDraws:
    """The kernels and the reference both draw what the definition says."""
    drawn = fused_sampling(logits, edited, bitmask, rows, wants_logprobs=wants_logprobs)
    reference = fused_sampling_reference(logits, edited, bitmask, rows, wants_logprobs=wants_logprobs)
    for row in range(len(rows.seed)):
        raw = logits[int(rows.logits_row[row])].double().cpu().numpy()
        token = true_token(allowed(raw, edited, bitmask, rows, row), rows, row)
        assert int(drawn.tokens[row]) == token, row
        assert int(reference.tokens[row]) == token, row
        assert int(drawn.status[row]) == int(reference.status[row]) == OK
        if wants_logprobs:
            columns = raw[: int(rows.num_columns[row])]
            logprob = raw[token] - np.logaddexp.reduce(columns)
            rank = 1 + (columns > raw[token]).sum()
            for found in (drawn, reference):
                assert abs(float(found.logprob[row]) - logprob) < 2e-6 * max(1.0, abs(logprob)), row
                assert int(found.rank[row]) == rank, row
    return drawn


def random_logits(
    count: int, size: int, device: torch.device, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(count, size, generator=generator) * spread).to(dtype).to(device)


def random_bits(count: int, num_words: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_words)
    words = torch.randint(-(2**31), 2**31, (count, num_words), generator=generator)
    return words.to(torch.int32).to(device)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(5003, torch.float32), (4104, torch.bfloat16), (300, torch.float16), (61, torch.bfloat16)],
    ids=str,
)
def test_rows_of_all_kinds(size, dtype, kernel_device):
    """Ties, in 16 bit; masks, some of fewer bits than there are tokens; edited rows; rows with vocabularies of their
    own; and one that the model's log-softmax is over."""
    rng = np.random.default_rng(size)
    count = 12
    settings = mixed(count, rng, num_tokens=[size, size, size - 7], num_columns=[size, size - 3, size - 20])
    for n, each in enumerate(settings):
        each["mask_row"] = n // 2 if n % 2 else -1
        each["edited_row"] = n // 3 if n % 3 == 0 else -1
    logits = random_logits(count, size, kernel_device, dtype)
    edited = random_logits(count // 3 + 1, size, kernel_device, spread=2.0)
    bitmask = random_bits(count // 2, size // 32, kernel_device)
    check(logits, rows_of(settings, size, kernel_device), edited, bitmask)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 50, "top_p": 0.999},
        {"top_k": 3000, "top_p": 0.7},
        {"top_k": 100_000, "top_p": 0.5},
        {"top_k": 40},
        {"top_p": 0.3},
        {"min_p": 0.2},
    ],
    ids=str,
)
def test_each_filter_by_itself(setting, kernel_device):
    """One row of flat logits, so that the most likely token is seldom the one, and one with many ties."""
    logits = torch.stack(
        [
            random_logits(1, 4100, kernel_device, spread=0.7)[0],
            random_logits(1, 4100, kernel_device)[0].round(),
        ]
    )
    check(logits, rows_of([setting | {"seed": 5}, setting | {"seed": 6}], 4100, kernel_device))


def test_a_vocabulary_of_128256(kernel_device):
    logits = random_logits(1, 128256, kernel_device, torch.bfloat16)
    check(logits, rows_of([{"temperature": 0.9, "top_p": 0.9}], 128256, kernel_device))


@pytest.mark.parametrize("size", [49152, 50257])
def test_large_vocabularies(size, kernel_device):
    logits = random_logits(1, size, kernel_device, torch.bfloat16)
    check(logits, rows_of([{"top_k": 50, "top_p": 0.9}], size, kernel_device), wants_logprobs=False)


def poisoned_empty(poisoned: Any) -> Any:
    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        made: Tensor = poisoned(*shape, dtype=dtype, device=device)
        return made

    return empty


@pytest.mark.parametrize("size", [4100, 4104])
def test_nothing_is_read_but_what_is_asked_for(size, kernel_device, triton_interpreter, monkeypatch):
    """Views with NaN around them, tables with unused rows of NaN, memory for results that holds NaN. Logits that were
    edited are not even read."""
    settings = mixed(6, np.random.default_rng(1))
    for n, each in enumerate(settings):
        each |= {
            "logits_row": 2 * n,
            "mask_row": n - 1,
            "edited_row": 1 if n == 3 else -1,
            "num_tokens": size - 9,
        }

    def surrounded(table: Tensor, columns: int, filler: float) -> Tensor:
        around = torch.full((2 * len(table), columns + 23), filler, dtype=table.dtype, device=kernel_device)
        around[::2, 16 : 16 + columns] = table
        return around[:, 16 : 16 + columns]

    logits = surrounded(random_logits(6, size, kernel_device), size, torch.nan)
    logits[6] = torch.nan
    logits[:, size - 9 :] = 1e30
    edited = surrounded(random_logits(1, size, kernel_device), size, torch.nan)
    edited = torch.cat([edited[1:], edited[:1]])
    bits = torch.cat([random_bits(5, size // 32, kernel_device)])
    bitmask = surrounded(bits, size // 32, -1)
    for each in settings:
        each["mask_row"] = max(2 * each["mask_row"], -1)
    monkeypatch.setattr(torch, "empty", poisoned_empty(triton_interpreter.poisoned))
    check(logits, rows_of(settings, size, kernel_device), edited, bitmask, wants_logprobs=False)


def test_forks_share_a_row_of_logits(kernel_device):
    """And differ in their branches alone, or in nothing."""
    settings = [{"logits_row": 0, "branch": branch, "seed": -3} for branch in (0, 1, 2, 3, 4, 0)]
    drawn = check(random_logits(1, 500, kernel_device, spread=1.0), rows_of(settings, 500, kernel_device))
    assert drawn.tokens[0] == drawn.tokens[5]
    assert len(drawn.tokens.unique()) == 5


def test_a_row_is_the_same_bits_alone_and_in_any_company(kernel_device):
    size = 4200
    rows = rows_of(mixed(6, np.random.default_rng(8)), size, kernel_device)
    logits = random_logits(6, size, kernel_device, torch.bfloat16, spread=1.0)
    together = fused_sampling(logits, None, None, rows, wants_logprobs=True)
    for kept in ([5, 3, 0], [4]):
        part = fused_sampling(logits, None, None, picked(rows, kept), wants_logprobs=True)
        for item in fields(FusedDraws):
            assert torch.equal(getattr(part, item.name), getattr(together, item.name)[kept]), item.name


def test_no_rows(kernel_device):
    drawn = fused_sampling(
        random_logits(1, 40, kernel_device), None, None, rows_of([], 40, kernel_device), wants_logprobs=True
    )
    assert {getattr(drawn, item.name).shape for item in fields(FusedDraws)} == {(0,)}


def test_rows_of_which_nothing_can_come(kernel_device):
    """Each with its status; and those beside which a NaN does not matter."""
    size, inf, nan = 40, torch.inf, torch.nan
    bitmask = torch.zeros(3, 2, dtype=torch.int32, device=kernel_device)
    bitmask[1, 0] = 1 << 9
    bitmask[2] = ~0
    logits = random_logits(9, size, kernel_device)
    logits[1, 3], logits[2, 3], logits[3], logits[4, 3] = nan, nan, -inf, inf
    logits[5], logits[6, 20:], logits[8, 3] = nan, nan, inf
    cases: list[tuple[dict[str, float], int, int | None]] = [
        ({"mask_row": 0}, NOTHING_ALLOWED, -1),
        ({"mask_row": 1}, OK, 9),
        ({"mask_row": 2, "top_k": 3}, NOT_NUMBERS, -1),
        ({"top_p": 0.5}, NOTHING_ALLOWED, -1),
        ({"temperature": 0.0}, NOT_NUMBERS, -1),
        ({"min_p": 0.5}, NOT_NUMBERS, -1),
        ({"num_tokens": 20}, OK, None),
        ({"num_tokens": 0}, NOTHING_ALLOWED, -1),
        ({"mask_row": 1, "temperature": 0.0}, OK, 9),
    ]
    rows = rows_of([case[0] for case in cases], size, kernel_device)
    drawn = fused_sampling(logits, None, bitmask, rows, wants_logprobs=True)
    reference = fused_sampling_reference(logits, None, bitmask, rows, wants_logprobs=True)
    assert drawn.status.tolist() == reference.status.tolist() == [case[1] for case in cases]
    assert drawn.tokens.tolist() == reference.tokens.tolist()
    for found, (_, _, token) in zip(drawn.tokens.tolist(), cases, strict=True):
        assert 0 <= found < 20 if token is None else found == token


EDGES: dict[str, dict[str, float]] = {
    "equal, free": {},
    "equal, top-k 1": {"top_k": 1},
    "equal, top-k and top-p": {"top_k": 3, "top_p": 0.01},
    "equal, greedy": {"temperature": 0.0},
    "equal, min-p 1": {"min_p": 1.0},
    "top-p 1e-30": {"top_p": 1e-30},
    "min-p 1": {"min_p": 1.0},
    "top-k and a top-p of nearly everything": {"top_k": 9, "top_p": 0.99999, "temperature": 50.0},
    "more than there are": {"top_k": 1000, "top_p": 0.6},
    "hot": {"temperature": 1e30, "top_k": 20, "top_p": 0.5},
    "hotter": {"temperature": 3e38},
}


def test_edges(kernel_device):
    """Every token equal; nothing left but the most likely; more wanted than there is; logits of -inf."""
    logits = random_logits(len(EDGES), 70, kernel_device)
    logits[:5] = -2.5
    logits[5:, ::3] = -torch.inf
    settings = [each | {"seed": number} for number, each in enumerate(EDGES.values())]
    drawn = check(logits, rows_of(settings, 70, kernel_device), wants_logprobs=False)
    assert drawn.tokens[3] == 0
    assert drawn.tokens[5] == logits[5].argmax()
    assert drawn.tokens[6] == logits[6].argmax()


def test_the_last_of_the_top_k_has_many_equals(kernel_device):
    """Top-p counts the mass of all 100 that equal the 50th: 0.04 of it is more than the first token has, 0.02 less."""
    logits = torch.full((1, 400), -5.0, device=kernel_device)
    logits[:, 10:110], logits[:, 200] = -1.0, 0.0
    settings = [
        {"top_k": 50, "top_p": p, "logits_row": 0, "seed": seed} for p in (0.04, 0.02) for seed in range(3)
    ]
    drawn = check(logits, rows_of(settings, 400, kernel_device), wants_logprobs=False)
    assert (drawn.tokens[:3] < 110).any()
    assert drawn.tokens[3:].tolist() == [200] * 3


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_nearly_no_temperature_is_greedy(filters, kernel_device):
    """1e-40 is no normal float32, and logits divided by 1e-38 are beyond one."""
    logits = random_logits(1, 30, kernel_device) * 1e3
    logits[:, ::4] = -torch.inf
    settings = [
        filters | {"temperature": temperature, "logits_row": 0, "seed": seed}
        for seed, temperature in enumerate((1e-6, 1e-37, 1e-38, 1e-45))
    ]
    drawn = fused_sampling(logits, None, None, rows_of(settings, 30, kernel_device), wants_logprobs=False)
    assert drawn.tokens.tolist() == [int(logits.argmax())] * 4
    assert drawn.status.tolist() == [OK] * 4


@pytest.mark.parametrize("setting", [{"temperature": 0.8}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_draws_follow_the_exact_distribution(setting):
    """20 000 of the reference, which the kernels equal. A correct sampler fails with probability 1e-4."""
    logits = random_logits(1, 24, torch.device("cpu"), spread=1.5)
    rows = rows_of([setting | {"logits_row": 0, "position": n, "seed": 11} for n in range(20_000)], 24)
    tokens = fused_sampling_reference(logits, None, None, rows, wants_logprobs=False).tokens.numpy()
    probs = (logits[0].double() / setting.get("temperature", 1.0)).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: int(setting.get("top_k", 24))]
    before = probs[kept].cumsum(0) - probs[kept]
    kept = kept[before < setting.get("top_p", 1.0) * probs[kept].sum()].numpy()
    expected = probs.numpy()[kept] / probs.numpy()[kept].sum() * len(tokens)
    counts = np.bincount(tokens, minlength=24)
    assert counts[kept].sum() == len(tokens)
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_draws_the_same_tokens(dtype):
    """`sampling.sample`, on rows of all kinds, tied ones too."""
    count, size = 150, 3000
    settings = mixed(count, np.random.default_rng(3))
    rows = rows_of(settings, size)
    logits = random_logits(count, size, torch.device("cpu"), dtype, spread=1.0)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "branch", "position")
    own = {name: getattr(rows, name) for name in names}
    own = {name: value if value.is_floating_point() else value.long() for name, value in own.items()}
    on_cpu = sample(logits.float(), SamplingRows(**own, typical_p=torch.ones(count)))
    reference = fused_sampling_reference(logits, None, None, rows, wants_logprobs=False)
    assert on_cpu.tolist() == reference.tokens.tolist()


def test_the_bytes_that_must_move():
    """Three rows of 1000 logits, two of them read, one edited; two masks of 32 words."""
    settings = [
        {"logits_row": 0, "mask_row": 0},
        {"logits_row": 0},
        {"logits_row": 2},
        {"edited_row": 0, "mask_row": 1},
    ]
    rows = rows_of(settings, 1000)
    logits = torch.empty(4, 1000, dtype=torch.bfloat16)
    assert fused_sampling_bytes(logits, rows, 32, wants_logprobs=False) == 2 * 2000 + 4000 + 2 * 128
    assert fused_sampling_bytes(logits, rows, 32, wants_logprobs=True) == 3 * 2000 + 4000 + 2 * 128
