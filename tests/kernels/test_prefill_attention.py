"""Prefill attention against float64, row by row, in Triton's interpreter and, where there is one, on a GPU."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.kernels.prefill_work import PrefillWork, plan_prefill

pytest.importorskip("triton")

from cadenza.kernels import prefill_attention as module

FLOAT32_ERROR = 4e-6
"""Of a result, relative to the mean of its values' magnitudes."""


@dataclass(frozen=True)
class Case:
    group: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    chunks: tuple[tuple[int, int], ...]
    """(start, rows)"""
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads


FLOAT, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "chunks of 1, 65 and 64 rows": Case(1, 1, 64, 64, FLOAT, ((0, 1), (64, 65), (128, 64))),
    "as Llama": Case(4, 2, 128, 128, BF16, ((64, 30), (0, 17))),
    "as SmolLM2": Case(3, 2, 64, 64, FLOAT, ((0, 70),)),
    "float32, wide heads, blocks of 32": Case(2, 1, 128, 128, FLOAT, ((64, 33),), 32),
    "other values than keys, more heads than two": Case(4, 1, 80, 48, FP16, ((0, 66), (192, 5)), 32),
    "odd sizes": Case(3, 1, 20, 7, FLOAT, ((64, 3),)),
    "a window within one block": Case(2, 1, 64, 64, FP16, ((0, 130), (128, 64)), window=5),
    "a window of one": Case(1, 1, 32, 32, FLOAT, ((64, 10),), window=1),
    "a window over blocks": Case(2, 1, 80, 80, BF16, ((192, 70), (0, 40)), window=100),
    "a soft cap": Case(2, 1, 64, 64, FP16, ((64, 40),), softcap=2.0),
    "sinks": Case(4, 1, 64, 64, BF16, ((64, 65), (0, 3)), has_sinks=True),
    "everything": Case(3, 1, 64, 32, FLOAT, ((128, 66),), 32, window=70, softcap=1.5, has_sinks=True),
    "wider heads": Case(2, 1, 256, 256, BF16, ((0, 20),), window=9),
}


@dataclass(frozen=True)
class Prompts:
    """Queries among other rows, and a cache that holds no number but the chunks' keys and values."""

    case: Case
    q: Tensor
    keys: Tensor
    values: Tensor
    work: PrefillWork
    first_rows: list[int]
    own_keys: list[Tensor]
    """Of each chunk, [end, Hkv, D]."""
    own_values: list[Tensor]
    sinks: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        return {"scale": 0.3, "window": case.window, "softcap": case.softcap, "sinks": self.sinks}

    def run(self) -> list[Tensor]:
        """Of each chunk, [rows, H, Dv]."""
        out = module.prefill_attention(self.q, self.keys, self.values, self.work, **self.options)
        assert out.dtype == self.q.dtype
        assert out.is_contiguous()
        return self.rows_of(out)

    def rows_of(self, out: Tensor) -> list[Tensor]:
        rows = [count for _, count in self.case.chunks]
        return [out[first : first + count] for first, count in zip(self.first_rows, rows, strict=True)]

    def truth(self) -> list[tuple[Tensor, Tensor]]:
        """Of each chunk, (result, mean of its values' magnitudes), both float64 [rows, H, Dv]."""
        queries = [chunk.double().cpu() for chunk in self.rows_of(self.q)]
        return [self._truth(number, chunk) for number, chunk in enumerate(queries)]

    def _truth(self, number: int, q: Tensor) -> tuple[Tensor, Tensor]:
        case = self.case
        k, v = self.own_keys[number].double(), self.own_values[number].double()
        found = torch.empty(2, len(q), case.num_heads, case.value_dim, dtype=torch.float64)
        for row in range(len(q)):
            end = case.chunks[number][0] + row + 1
            begin = 0 if case.window is None else max(0, end - case.window)
            for head in range(case.num_heads):
                kv_head = head // case.group
                scores = k[begin:end, kv_head] @ q[row, head] * 0.3
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                total = scores.exp().sum()
                if self.sinks is not None:
                    total += self.sinks[head].double().cpu().exp()
                weights = scores.exp() / total
                found[0, row, head] = weights @ v[begin:end, kv_head]
                found[1, row, head] = weights @ v[begin:end, kv_head].abs()
        return found[0], found[1]


def prompts_of(interpreter: ModuleType, device: torch.device, case: Case, seed: int = 0) -> Prompts:
    """Blocks and rows lie elsewhere with each seed; what a chunk holds depends only on its start and length."""
    poisoned, generator = interpreter.poisoned, torch.Generator().manual_seed(seed)
    block_size, ends = case.block_size, [start + count for start, count in case.chunks]
    counts = [-(-end // block_size) for end in ends]
    ids = (
        torch.randperm(sum(counts) + 3, generator=generator) + 1
    ).tolist()  # what pads a table, 0, holds nothing
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    width = case.key_dim + case.value_dim
    cache = poisoned(sum(counts) + 4, block_size, case.num_kv_heads, width, dtype=case.dtype)
    first_rows, num_rows = [], 0
    for _, count in case.chunks:
        first_rows.append(num_rows + 2 + seed)
        num_rows = first_rows[-1] + count
    q = poisoned(num_rows + 1, 3 + case.num_heads * case.key_dim, dtype=case.dtype)
    queries = q[:, 3:].unflatten(1, (case.num_heads, case.key_dim))
    own = []
    for table, first_row, (start, count), end in zip(tables, first_rows, case.chunks, ends, strict=True):
        content = torch.Generator().manual_seed(1000 * end + start)
        own.append(torch.randn(end, case.num_kv_heads, width, generator=content).to(case.dtype))
        at = torch.arange(end)
        cache[torch.tensor(table)[at // block_size], at % block_size] = own[-1]
        new = torch.randn(count, case.num_heads, case.key_dim, generator=content).to(case.dtype)
        queries[first_row : first_row + count] = new
    plan = plan_prefill(
        tables,
        [start for start, _ in case.chunks],
        first_rows,
        [count for _, count in case.chunks],
        block_size,
    )
    cache = cache.to(device)
    return Prompts(
        case,
        q.to(device)[:, 3:].unflatten(1, (case.num_heads, case.key_dim)),
        cache[..., : case.key_dim],
        cache[..., case.key_dim :],
        PrefillWork.of(plan, device),
        first_rows,
        [chunk[..., : case.key_dim] for chunk in own],
        [chunk[..., case.key_dim :] for chunk in own],
        torch.linspace(-1, 3, case.num_heads).to(case.dtype).to(device) if case.has_sinks else None,
    )


def allowed(prompts: Prompts, result: Tensor, magnitude: Tensor) -> Tensor:
    """A 16-bit result is rounded once, in the interpreter truncated; a GPU rounds the weights too."""
    unit = 0.0 if prompts.case.dtype == FLOAT else torch.finfo(prompts.case.dtype).eps
    of_weights = unit if prompts.q.is_cuda else 0.0
    return unit * result.abs() + (FLOAT32_ERROR + of_weights) * magnitude


@pytest.mark.parametrize("name", CASES)
def test_results_equal_float64(name, kernel_device, triton_interpreter):
    prompts = prompts_of(triton_interpreter, kernel_device, CASES[name])
    for found, (result, magnitude) in zip(prompts.run(), prompts.truth(), strict=True):
        assert ((found.double().cpu() - result).abs() <= allowed(prompts, result, magnitude)).all()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_same_function(name, kernel_device, triton_interpreter):
    prompts = prompts_of(triton_interpreter, kernel_device, CASES[name])
    options = prompts.options
    if prompts.sinks is not None:
        options["sinks"] = prompts.sinks.double()
    q, keys, values = (part.double() for part in (prompts.q, prompts.keys, prompts.values))
    exact = prompts.rows_of(module.prefill_attention_reference(q, keys, values, prompts.work, **options))
    own = prompts.rows_of(
        module.prefill_attention_reference(
            prompts.q, prompts.keys, prompts.values, prompts.work, **prompts.options
        )
    )
    for found, rounded, (result, magnitude) in zip(exact, own, prompts.truth(), strict=True):
        assert torch.allclose(found.cpu(), result, rtol=1e-12, atol=1e-12)
        assert ((rounded.double().cpu() - result).abs() <= allowed(prompts, result, magnitude)).all()


def test_only_the_chunks_rows_are_written(kernel_device, triton_interpreter):
    """Into a view; heads come before rows."""
    prompts = prompts_of(
        triton_interpreter, kernel_device, CASES["other values than keys, more heads than two"]
    )
    num_rows, num_heads, value_dim = len(prompts.q), prompts.case.num_heads, prompts.case.value_dim
    whole = triton_interpreter.poisoned(
        num_heads, num_rows, value_dim + 2, dtype=prompts.q.dtype, device=str(kernel_device)
    )
    out = whole.transpose(0, 1)[..., :value_dim]
    q = prompts.q.transpose(0, 1).contiguous().transpose(0, 1)
    result = module.prefill_attention(
        q, prompts.keys, prompts.values, prompts.work, out=out, **prompts.options
    )
    assert result is out
    for found, expected in zip(prompts.rows_of(out), prompts.run(), strict=True):
        assert torch.equal(found, expected)
    num_written = sum(count for _, count in prompts.case.chunks) * num_heads * value_dim
    assert int((~whole.isnan()).sum()) == num_written


@pytest.mark.parametrize(("window", "dtype"), [(None, FLOAT), (None, BF16), (70, BF16), (70, FLOAT)])
def test_a_row_is_the_same_bits_however_its_prompt_is_cut(window, dtype, kernel_device, triton_interpreter):
    case = Case(2, 1, 32, 32, dtype, ((0, 200),), window=window)
    whole = prompts_of(triton_interpreter, kernel_device, case)
    expected = whole.run()[0]
    table = whole.work.block_tables[0].tolist()
    parts = [(0, 64), (64, 128), (192, 8)]
    plan = plan_prefill(
        [table] * 3, [start for start, _ in parts], [300, 100, 10], [count for _, count in parts], 16
    )
    q = triton_interpreter.poisoned(370, 2, 32, dtype=dtype, device=str(kernel_device))
    for first, (start, count) in zip(plan.first_rows, parts, strict=True):
        q[first : first + count] = whole.rows_of(whole.q)[0][start : start + count]
    out = module.prefill_attention(
        q, whole.keys, whole.values, PrefillWork.of(plan, kernel_device), **whole.options
    )
    for first, (start, count) in zip(plan.first_rows, parts, strict=True):
        assert torch.equal(out[first : first + count], expected[start : start + count])


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_a_row_is_the_same_bits_alone_and_in_any_company(dtype, kernel_device, triton_interpreter):
    """And wherever its blocks and rows are."""
    case = Case(2, 1, 32, 32, dtype, ((64, 70), (0, 1), (0, 64), (192, 3)), window=130, has_sinks=True)
    together = prompts_of(triton_interpreter, kernel_device, case).run()
    for seed, kept in enumerate([[0], [1], [3, 0], [2, 1, 3]], start=1):
        part = replace(case, chunks=tuple(case.chunks[number] for number in kept))
        found = prompts_of(triton_interpreter, kernel_device, part, seed).run()
        for number, own in zip(kept, found, strict=True):
            assert torch.equal(own, together[number])


def test_a_soft_cap_and_a_sink_bear_any_score(kernel_device, triton_interpreter):
    """Scores of thousands; a sink that takes all of the weight, and one that takes none."""
    case = Case(2, 1, 32, 32, FLOAT, ((64, 10),), softcap=30.0)
    prompts = prompts_of(triton_interpreter, kernel_device, case)
    prompts.q.mul_(1000)
    sinks = torch.tensor([-torch.inf, 1000.0], device=kernel_device)
    found = replace(prompts, sinks=sinks).run()[0].cpu()
    result, magnitude = prompts.truth()[0]
    assert ((found - result).abs() <= 10 * FLOAT32_ERROR * magnitude)[:, 0].all()
    assert (found[:, 1] == 0).all()


def test_without_chunks_nothing_happens(kernel_device, triton_interpreter):
    prompts = prompts_of(triton_interpreter, kernel_device, Case(4, 2, 64, 32, BF16, ()))
    empty = module.prefill_attention(
        prompts.q[:0], prompts.keys, prompts.values, prompts.work, **prompts.options
    )
    assert empty.shape == (0, 8, 32)
    out = triton_interpreter.poisoned(1, 8, 32, dtype=BF16, device=str(kernel_device))
    module.prefill_attention(
        prompts.q, prompts.keys, prompts.values, prompts.work, out=out, **prompts.options
    )
    assert out.isnan().all()


def test_the_bytes_and_operations_that_must_be():
    """Rows at 64, 65 and 66 of one chunk see 65, 66 and 67 keys, one at 0 of another itself; of a window of 66, the
    first two see all, the third 66; a window of 2 begins at key 63."""
    plan = plan_prefill([[0] * 5, [0]], [64, 0], [0, 3], [3, 1], 16)
    shape = (32, 128, 64)
    assert module.prefill_attention_flops(plan, *shape) == 2 * (65 + 66 + 67 + 1) * 32 * 192
    assert module.prefill_attention_flops(plan, *shape, window=66) == 2 * (65 + 66 + 66 + 1) * 32 * 192
    sizes = (32, 8, 128, 64, BF16)
    assert module.prefill_attention_bytes(plan, *sizes) == (4 * 32 + (67 + 1) * 8) * 192 * 2
    assert module.prefill_attention_bytes(plan, *sizes, window=2) == (4 * 32 + (4 + 1) * 8) * 192 * 2
