"""Decode attention against a softmax in float64, in Triton's interpreter and, where there is one, on a GPU."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cadenza.kernels.decode_work import DecodeWork, plan_decode

pytest.importorskip("triton")

from cadenza.kernels import decode_attention as kernel

ERRORS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed, relative to the largest value. In 16 bit a GPU rounds the weights as well as the result."""


@dataclass
class Step:
    """One layer's cache and queries. Slots that nobody may read are NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: list[list[int]]
    positions: list[int]
    options: dict[str, object] = field(default_factory=dict)

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
        return kernel.decode_attention(q, self.keys, self.values, self.work(rows), **self.options).cpu()

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


BORDERS = [0, 255, 256, 257, 31, 600]

CASES = {
    "borders of splits": (BORDERS, {}),
    "one row, one key": ([0], {"kv_heads": 1, "group": 1}),
    "one query per key head, odd heads": ([300, 12], {"kv_heads": 3, "group": 1, "dim": 80}),
    "three": ([300, 12], {"kv_heads": 3, "group": 3}),
    "eight, long heads": ([270, 63], {"kv_heads": 1, "group": 8, "dim": 128}),
    "more than a tile": ([270, 3], {"kv_heads": 1, "group": 40, "dim": 32}),
    "values of another size": ([257, 40], {"dim": 48, "value_dim": 80}),
    "very long heads": ([257], {"kv_heads": 1, "group": 2, "dim": 256}),
    "blocks of 64": ([300, 12], {"block_size": 64}),
    "blocks of 4": ([300, 12], {"block_size": 4}),
    "small window": (BORDERS, {"window": 7, "kv_heads": 1}),
    "window of a split": (BORDERS, {"window": 256, "kv_heads": 1}),
    "long window": ([900, 20, 639], {"window": 384, "kv_heads": 1}),
    "window longer than all": ([300, 5], {"window": 4096, "kv_heads": 1}),
    "soft cap": ([300, 5], {"softcap": 3.0}),
    "sinks": (BORDERS, {"sinks": True, "kv_heads": 1}),
    "everything": ([530, 2, 300], {"softcap": 5.0, "sinks": True, "window": 100, "group": 3, "dim": 80}),
    "bfloat16": ([300, 12, 256], {"dtype": torch.bfloat16}),
    "float16": ([300, 12, 256], {"dtype": torch.float16}),
    "bfloat16, everything": (
        [530, 2],
        {"dtype": torch.bfloat16, "softcap": 5.0, "sinks": True, "window": 100},
    ),
    "shared prefix": ([600, 530, 700, 515], {"prefix": 512, "group": 8, "dim": 32}),
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
