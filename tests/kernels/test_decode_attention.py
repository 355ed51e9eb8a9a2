"""Decode attention against a softmax in float64, in Triton's interpreter and, where there is one, on a GPU."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.kernels.decode_work import DecodeWork, plan_decode

pytest.importorskip("triton")

from cadenza.kernels import decode_attention as kernel

ERRORS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed, relative to the largest value. In 16 bit a GPU rounds the weights as well as the result."""


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(triton_interpreter, monkeypatch):
    """Results and partial results are NaN before they are written."""

    class Torch:
        empty = staticmethod(triton_interpreter.poisoned)

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(kernel, "torch", Torch())


@dataclass
class Step:
    """One layer's cache and queries. Slots that nobody may read are NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: list[list[int]]
    positions: list[int]
    options: dict[str, object]
    planned_window: int | None = None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.keys.shape[2]

    def work(self, rows: list[int] | None = None, window: int | None = None) -> DecodeWork:
        """Of some of the rows, in this order."""
        rows = list(range(len(self.tables))) if rows is None else rows
        tables, positions = [self.tables[row] for row in rows], [self.positions[row] for row in rows]
        return plan_decode(tables, positions, self.keys.shape[1], self.group, window=window).upload(
            self.q.device
        )

    def run(self, rows: list[int] | None = None) -> Tensor:
        q = self.q if rows is None else self.q[rows]
        work = self.work(rows, self.planned_window)
        return kernel.decode_attention(q, self.keys, self.values, work, **self.options).cpu()

    def truth(self) -> Tensor:
        """[R, H, Dv] float64, key by key in words of the definition."""
        rows, heads, _ = self.q.shape
        out = torch.zeros(rows, heads, self.values.shape[3], dtype=torch.float64)
        q, keys, values = (part.double().cpu() for part in (self.q, self.keys, self.values))
        window, softcap, sinks = (self.options.get(name) for name in ("window", "softcap", "sinks"))
        block_size = keys.shape[1]
        for row, position in enumerate(self.positions):
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            slots = [(self.tables[row][at // block_size], at % block_size) for at in seen]
            for head in range(heads if slots else 0):
                own = [(keys[slot][head // self.group], values[slot][head // self.group]) for slot in slots]
                scores = torch.stack([key for key, _ in own]) @ q[row, head] * self.options["scale"]
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                sink = [] if sinks is None else [sinks[head].double().cpu()]
                weights = torch.softmax(torch.stack([*scores, *sink]), 0)[: len(slots)]
                out[row, head] = weights @ torch.stack([value for _, value in own])
        return out


def step_of(
    device: torch.device,
    positions: list[int],
    *,
    kv_heads: int = 2,
    group: int = 4,
    dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    prefix: int = 0,
    **options: object,
) -> Step:
    """Rows whose tables begin with the same blocks of `prefix` positions, and go on with blocks of their own, in random
    order. NaN in every slot beyond its owner's position and in blocks that nobody has."""
    generator = torch.Generator().manual_seed(len(positions) + sum(positions) + dim)
    value_dim = dim if value_dim is None else value_dim
    counts = [position // block_size + 1 for position in positions]
    num_shared = prefix // block_size
    ids = (torch.randperm(sum(counts) + num_shared + 5, generator=generator)).tolist()
    taken = iter(ids)
    shared = list(itertools.islice(taken, num_shared))
    tables = [
        (shared + list(itertools.islice(taken, max(0, count - num_shared))))[:count] for count in counts
    ]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values = (random(len(ids), block_size, kv_heads, size) for size in (dim, value_dim))
    is_seen = torch.zeros(len(ids), block_size, dtype=torch.bool)
    for table, position in zip(tables, positions, strict=True):
        for number, block in enumerate(table):
            is_seen[block, : max(0, position + 1 - number * block_size)] = True
    for part in (keys, values):
        part[~is_seen] = torch.nan
    sinks = options.get("sinks")
    if sinks is not None:
        options["sinks"] = random(kv_heads * group).mul(3).to(device)
    return Step(
        random(len(positions), kv_heads * group, dim).mul(2).to(dtype).to(device),
        *(part.to(dtype).to(device) for part in (keys, values)),
        tables,
        positions,
        {"scale": dim**-0.5} | options,
    )


def check(step: Step, result: Tensor) -> None:
    truth = step.truth()
    assert result.dtype == step.q.dtype
    assert result.is_contiguous()
    assert ((result.double() - truth).abs() <= ERRORS[step.q.dtype] * truth.abs().max()).all()


BORDERS = [0, 255, 256, 257, 600]

CASES = {
    "borders of splits": (BORDERS, {"kv_heads": 1}),
    "one row, one key": ([0], {"kv_heads": 1, "group": 1}),
    "one query per key head, odd heads": ([300, 12], {"kv_heads": 3, "group": 1, "dim": 80}),
    "three": ([300, 12], {"kv_heads": 3, "group": 3}),
    "eight, long heads": ([270, 63], {"kv_heads": 1, "group": 8, "dim": 128}),
    "more than a tile": ([270, 3], {"kv_heads": 1, "group": 40, "dim": 32}),
    "values of another size": ([257, 40], {"dim": 48, "value_dim": 80}),
    "very long heads": ([257], {"kv_heads": 1, "group": 2, "dim": 256}),
    "blocks of 64": ([300, 12], {"block_size": 64}),
    "blocks of 4": ([300, 12], {"block_size": 4}),
    "small window": (BORDERS, {"window": 7, "kv_heads": 1, "group": 2}),
    "windows that begin about a border of splits": (
        [261, 262, 263],
        {"window": 7, "kv_heads": 1, "group": 2},
    ),
    "window of a split": (BORDERS, {"window": 256, "kv_heads": 1, "group": 2}),
    "long window": ([900, 20, 639], {"window": 384, "kv_heads": 1, "group": 2}),
    "window longer than all": ([300, 5], {"window": 4096, "kv_heads": 1}),
    "soft cap": ([300, 5], {"softcap": 3.0}),
    "sinks": (BORDERS, {"sinks": True, "kv_heads": 1, "group": 2}),
    "everything": (
        [530, 2, 300],
        {"kv_heads": 1, "softcap": 5.0, "sinks": True, "window": 100, "group": 3, "dim": 80},
    ),
    "bfloat16": ([300, 12, 256], {"kv_heads": 1, "dtype": torch.bfloat16}),
    "float16": ([300, 12, 256], {"kv_heads": 1, "dtype": torch.float16}),
    "bfloat16, everything": (
        [530, 2],
        {"dtype": torch.bfloat16, "softcap": 5.0, "sinks": True, "window": 100},
    ),
    "shared prefix": ([600, 530, 515], {"prefix": 512, "kv_heads": 1, "group": 8, "dim": 32}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_softmax_over_what_a_row_sees(name, kernel_device):
    positions, settings = CASES[name]
    step = step_of(kernel_device, positions, **settings)
    check(step, step.run())


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_same_function(name):
    positions, settings = CASES[name]
    step = step_of(torch.device("cpu"), positions, **settings)
    parts = [part.double() for part in (step.q, step.keys, step.values)]
    result = kernel.decode_attention_reference(*parts, step.work(), **step.options)
    assert torch.allclose(result, step.truth(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["small window", "window of a split", "long window", "everything"])
def test_a_plan_for_a_window_leaves_out_what_is_before_it(name, kernel_device):
    positions, settings = CASES[name]
    step = step_of(kernel_device, positions, **settings | {"dtype": torch.float16})
    planned = replace(step, planned_window=settings["window"])
    assert planned.work(window=settings["window"]).num_partials < step.work().num_partials
    assert torch.equal(planned.run(), step.run())


def test_a_plan_for_a_window_does_for_narrower_ones_only(kernel_device):
    step = step_of(kernel_device, [600, 270], window=100, kv_heads=1)
    expected = step.run()
    assert torch.equal(replace(step, planned_window=300).run(), expected)
    for options in (step.options, step.options | {"window": None}):
        with pytest.raises(AssertionError):
            replace(step, planned_window=99, options=options).run()


FEW_HEADS = {"kv_heads": 1, "group": 2, "dtype": torch.float16}

SHARING = {
    "forks": ([600, 530, 700, 515], {"prefix": 512}),
    "float32": ([300, 260, 319], {"prefix": 256, "dtype": torch.float32}),
    "a prompt that ends with a split": ([511, 512, 513], {"prefix": 512}),
    "more forks than an item has members": ([260, 300, 265], {"prefix": 256, "group": 11}),
    "bfloat16": ([300, 260, 319], {"prefix": 256, "dtype": torch.bfloat16}),
    "windows that end in a shared split": ([600, 530, 760], {"prefix": 512, "window": 300}),
    "everything": ([600, 530, 700], {"prefix": 512, "window": 300, "softcap": 5.0, "sinks": True, "dim": 80}),
}


@pytest.mark.parametrize("name", SHARING)
def test_a_row_has_the_same_bits_alone_and_among_rows_that_share_its_keys(name, kernel_device):
    positions, settings = SHARING[name]
    step = step_of(kernel_device, positions, **FEW_HEADS | settings)
    work = step.work()
    assert len(work.members) < work.num_partials, "nothing is shared"
    together = step.run()
    check(step, together)
    alone = torch.cat([step.run([row]) for row in range(len(positions))])
    assert torch.equal(together, alone)
    assert torch.equal(step.run([2, 0]), together[[2, 0]])


def test_drafts_share_full_splits_and_see_nothing_beyond_themselves(kernel_device):
    """One branch's rows at successive positions; what the last one's key and value hold is no number."""
    positions = [509, 510, 511, 512, 513]
    step = step_of(kernel_device, positions, kv_heads=1)
    step.tables = [step.tables[-1][:33]] * 5
    step.keys[step.tables[0]] = 1.0
    step.values[step.tables[0]] = 0.5
    step.keys[step.tables[0][32], 1:] = torch.nan
    step.values[step.tables[0][32], 1:] = torch.nan
    result = step.run()
    assert result[:4].isfinite().all()
    assert result[4].isnan().all()
    # Split 0 is one item; split 1 is full for the last three, split 2 for nobody.
    assert (step.work().members >= 0).sum(1).tolist() == [5, 1, 1, 3, 1, 1]
    check(replace(step, q=step.q[:4], tables=step.tables[:4], positions=positions[:4]), result[:4])


def test_it_reads_views_and_nothing_around_them(kernel_device):
    """Queries as part of a fused projection's rows, keys and values interleaved in one cache."""
    step = step_of(kernel_device, [17, 40], dim=80, group=2)
    expected = step.run()
    rows, heads, dim = step.q.shape
    projected = torch.full((rows, (heads + 4) * dim + 32), torch.nan, device=kernel_device)
    projected[:, 32 : 32 + heads * dim] = step.q.flatten(1)
    blocks, block_size, kv_heads, _ = step.keys.shape
    cache = torch.full((blocks, 2, kv_heads, block_size, dim + 16), torch.nan, device=kernel_device)
    cache[:, 0, :, :, :dim] = step.keys.transpose(1, 2)
    cache[:, 1, :, :, :dim] = step.values.transpose(1, 2)
    keys, values = (cache[:, part, :, :, :dim].transpose(1, 2) for part in range(2))
    q = projected[:, 32 : 32 + heads * dim].unflatten(1, (heads, dim))
    assert not any(part.is_contiguous() for part in (q, keys, values))
    assert torch.equal(replace(step, q=q, keys=keys, values=values).run(), expected)


def test_the_result_may_have_its_place(kernel_device, triton_interpreter):
    """The first rows of a larger tensor, whose others are left."""
    step = step_of(kernel_device, [17, 40], dim=80, group=2)
    expected = step.run()
    place = triton_interpreter.poisoned(5, *expected.shape[1:], device=str(kernel_device))
    result = kernel.decode_attention(
        step.q, step.keys, step.values, step.work(), **step.options, out=place[:2]
    )
    assert result.data_ptr() == place.data_ptr()
    assert torch.equal(place[:2].cpu(), expected)
    assert place[2:].isnan().all()


def test_addresses_may_be_beyond_32_bits(triton_interpreter):
    """A cache of 8 GiB, of which the system brings what is written: the last block's slots."""
    triton_interpreter.skip_where_it_fails()
    num_blocks = (1 << 32) // (16 * 64) // 2 + 1
    whole = torch.from_numpy(np.zeros((num_blocks, 16, 1, 64), np.float32))
    block, step = num_blocks - 1, step_of(torch.device("cpu"), [5], kv_heads=1, group=1)
    whole[block] = step.keys[step.tables[0][0]]
    far = replace(step, keys=whole, values=whole, tables=[[block]])
    near = replace(step, values=step.keys)
    with triton_interpreter.interpreted():
        assert torch.equal(far.run(), near.run())


@pytest.mark.parametrize("options", [{}, {"sinks": True}])
def test_rows_that_are_padding_are_zero(options, kernel_device):
    step = step_of(kernel_device, [300, 5], kv_heads=1, group=2, **options)
    expected = step.run()
    padded = replace(
        step,
        q=step.q[[0, 0, 1, 1]],
        tables=[step.tables[0], [], step.tables[1], []],
        positions=[300, -1, 5, -1],
    )
    result = padded.run()
    assert torch.equal(result[[0, 2]], expected)
    assert (result[[1, 3]] == 0).all()
    nobody = replace(step, tables=[[], []], positions=[-1, -1])
    assert (nobody.run() == 0).all()


def test_items_without_members_do_nothing(kernel_device):
    """As where launches are of fixed sizes."""
    step = step_of(kernel_device, [300, 5], kv_heads=1)
    work = step.work()
    padded = replace(
        work,
        members=torch.cat((work.members, torch.full_like(work.members[:2], -1))),
        splits=torch.cat((work.splits, torch.zeros_like(work.splits[:2]))),
        blocks=torch.cat((work.blocks, torch.zeros_like(work.blocks[:2]))),
        num_partials=work.num_partials + 3,
    )
    result = kernel.decode_attention(step.q, step.keys, step.values, padded, **step.options).cpu()
    assert torch.equal(result, step.run())


def test_no_rows(kernel_device):
    step = step_of(kernel_device, [3])
    assert replace(step, q=step.q[:0], tables=[], positions=[]).run().shape == (0, 8, 64)


def test_a_split_that_weighs_nothing_leaves_the_others(kernel_device):
    """All its scores are -inf."""
    step = step_of(kernel_device, [300], kv_heads=1, group=1)
    step.q[:] = step.q.abs()
    step.keys[step.tables[0][:16]] = -torch.inf
    result = step.run()
    assert result.isfinite().all()
    check(step, result)


def test_large_scores_neither_overflow_nor_vanish(kernel_device):
    step = step_of(kernel_device, [300, 20], kv_heads=1)
    check(replace(step, options={"scale": 40.0}), replace(step, options={"scale": 40.0}).run())
    capped = replace(step, options={"scale": 1e4, "softcap": 30.0})
    check(capped, capped.run())


@pytest.mark.parametrize("wrong", ["group", "block size", "dtype", "rows", "value rows"])
def test_what_does_not_fit_is_refused(wrong):
    step = step_of(torch.device("cpu"), [300, 20])
    q, keys, values, work = step.q, step.keys, step.values, step.work()
    match wrong:
        case "group":
            q = q.repeat(1, 2, 1)
        case "block size":
            keys, values = (part.reshape(-1, 8, *part.shape[2:]) for part in (keys, values))
        case "dtype":
            values = values.half()
        case "rows":
            q = q[:1]
        case "value rows":
            values = values[1:]
    with pytest.raises(AssertionError):
        kernel.decode_attention(q, keys, values, work, **step.options)


def test_shared_keys_are_counted_once():
    step = step_of(
        torch.device("cpu"), [600, 530, 515], prefix=512, kv_heads=2, group=8, dim=32, value_dim=48
    )
    num_keys = 512 + (601 - 512) + (531 - 512) + (516 - 512)
    expected = 4 * (num_keys * 2 * (32 + 48) + 3 * 16 * (32 + 48))
    assert kernel.decode_attention_bytes(step.q, step.keys, step.values, step.work()) == expected
    alone = [step.work([row]) for row in range(3)]
    counts = [kernel.decode_attention_bytes(step.q[:1], step.keys, step.values, work) for work in alone]
    assert sum(counts) == expected + 4 * 2 * 512 * 2 * (32 + 48)
