"""The Triton kernels against float64, in Triton's interpreter and, where there is one, on a GPU."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.kernels.lora_segments import Segments, segment

pytest.importorskip("triton")

from cadenza.kernels import lora_sgmv

FLOAT32_ERROR = 2e-6
"""Of a sum, relative to the sum of its terms' magnitudes."""


@dataclass
class Step:
    """One layer's tables, rows and uses."""

    x: Tensor
    a: Tensor
    b: Tensor
    out: Tensor
    rows: np.ndarray
    planes: np.ndarray
    scales: np.ndarray

    def segments(self) -> Segments:
        return segment(self.rows, self.planes, self.scales, self.x.device)

    def run(self) -> Tensor:
        segments = self.segments()
        out = self.out.clone()
        lora_sgmv.expand_(out, lora_sgmv.shrink(self.x, self.a, segments), self.b, segments)
        return out

    def truth(self) -> tuple[Tensor, Tensor]:
        """(result, sum of magnitudes), both float64: use by use, in words of the definition."""
        result, magnitude = self.out.double().cpu(), self.out.double().abs().cpu()
        a = self.a.double().cpu().view(-1, self.x.shape[1], 16)
        b = self.b.double().cpu().view(-1, 16, self.out.shape[1])
        x = self.x.double().cpu()
        for row, plane, scale in zip(self.rows, self.planes, self.scales, strict=True):
            result[row] += float(scale) * ((x[row] @ a[plane]) @ b[plane])
            magnitude[row] += abs(float(scale)) * ((x[row].abs() @ a[plane].abs()) @ b[plane].abs())
        return result, magnitude


def step_of(
    device: torch.device,
    per_row: list[list[int]],
    num_planes: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype = torch.float32,
) -> Step:
    """per_row: the planes of each row."""
    generator = torch.Generator().manual_seed(in_features + out_features)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    counts = [len(own) for own in per_row]
    return Step(
        x=random(len(per_row), in_features),
        a=random(num_planes * in_features, 16),
        b=random(num_planes * 16, out_features),
        out=random(len(per_row), out_features, dtype=out_dtype),
        rows=np.repeat(np.arange(len(per_row)), counts),
        planes=np.array([plane for own in per_row for plane in own], np.int64),
        scales=np.linspace(-1.0, 2.0, sum(counts)).astype(np.float32),
    )


MIXED = [[0], [], [1, 2], [3], [], [0], [1, 2], [4, 0, 2], [], [3]]
PROMPT = [[1, 2]] * 19 + [[0]]
"""More rows of one adapter than a tile has lanes, and a decode row."""

CASES = {
    "decode": (MIXED, 5, 100, 40, torch.float32),
    "prompt": (PROMPT, 3, 64, 33, torch.float32),
    "one row, one of everything": ([[0]], 1, 1, 1, torch.float32),
    "several blocks, the last ragged": ([[1], [0, 1]], 2, 97, 259, torch.float32),
    "several chunks": ([[1], [0, 1], []], 2, 2 * 2048 + 1, 7, torch.bfloat16),
    "bfloat16": (MIXED, 5, 300, 260, torch.bfloat16),
    "float16": (MIXED, 5, 300, 257, torch.float16),
    "as many adapters as rows": ([[row] for row in range(24)], 24, 48, 32, torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_both_products_equal_float64(name, kernel_device):
    step = step_of(kernel_device, *CASES[name])
    result, magnitude = step.truth()
    assert ((step.run().cpu() - result).abs() <= FLOAT32_ERROR * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_result_is_rounded_once(dtype, kernel_device):
    step = step_of(kernel_device, MIXED, 5, 96, 48, dtype, out_dtype=dtype)
    result, magnitude = step.truth()
    is_truncated = dtype == torch.bfloat16 and kernel_device.type == "cpu"
    unit = torch.finfo(dtype).eps * (1.0 if is_truncated else 0.5)
    allowed = unit * result.abs() + FLOAT32_ERROR * magnitude
    assert ((step.run().cpu().double() - result).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["decode", "prompt"])
def test_the_references_are_the_same_function(name, kernel_device):
    step = step_of(kernel_device, *CASES[name])
    segments = step.segments()
    out = step.out.double()
    y = lora_sgmv.shrink_reference(step.x.double(), step.a.double(), segments)
    lora_sgmv.expand_reference_(out, y, step.b.double(), segments)
    assert torch.allclose(out.cpu(), step.truth()[0], rtol=1e-12, atol=1e-12)
    shrunk = lora_sgmv.shrink(step.x, step.a, segments)
    assert torch.allclose(shrunk.sum(0).double(), y[0], rtol=0, atol=1e-4)


def test_nothing_is_read_or_written_but_what_is_used(kernel_device):
    """Views with other data around them, NaN in every row and plane that has no use."""
    per_row, num_planes, in_features, out_features, dtype = CASES["decode"]
    step = step_of(kernel_device, [*per_row, []], num_planes + 2, in_features, out_features, dtype)
    expected = step.run()
    unused = sorted(set(range(num_planes + 2)) - set(step.planes.tolist()))
    idle = sorted(set(range(len(per_row) + 1)) - set(step.rows.tolist()))
    step.a.view(num_planes + 2, -1)[unused] = torch.nan
    step.b.view(num_planes + 2, -1)[unused] = torch.nan
    x = torch.full((len(step.x), in_features + 13), torch.nan, device=kernel_device)
    x[:, 5 : 5 + in_features] = step.x
    x[idle] = torch.nan
    out = torch.full((len(step.out), out_features + 9), torch.nan, device=kernel_device)
    out[:, 4 : 4 + out_features] = step.out
    out[idle] = torch.nan
    segments = step.segments()
    y = lora_sgmv.shrink(x[:, 5 : 5 + in_features], step.a, segments)
    lora_sgmv.expand_(out[:, 4 : 4 + out_features], y, step.b, segments)
    used = sorted(set(step.rows.tolist()))
    assert torch.equal(out[used, 4 : 4 + out_features], expected[used])
    assert out[idle].isnan().all()
    assert out[:, :4].isnan().all()
    assert out[:, 4 + out_features :].isnan().all()


def test_without_uses_nothing_happens(kernel_device):
    step = step_of(kernel_device, [[], []], 1, 5, 3, torch.float32)
    assert lora_sgmv.shrink(step.x, step.a, step.segments()).shape == (1, 0, 16)
    assert torch.equal(step.run(), step.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_alone_and_in_any_company_and_lane(dtype, kernel_device):
    step = step_of(kernel_device, [*PROMPT, *MIXED], 5, 90, 35, dtype)
    together = step.run()
    order = np.random.default_rng(0).permutation(len(step.x))
    for kept in ([0], [18], [19], [22], [27], [0, 5, 27], sorted(order[:12]), list(range(6, 30))):
        is_kept = np.isin(step.rows, kept)
        part = Step(
            step.x[kept],
            step.a,
            step.b,
            step.out[kept],
            np.searchsorted(kept, step.rows[is_kept]),
            step.planes[is_kept],
            step.scales[is_kept],
        )
        assert torch.equal(part.run(), together[kept])


@pytest.mark.parametrize(("planes", "expected"), [([0, 1, 2], 0.0), ([0, 2, 1], 1.0)])
def test_a_rows_uses_are_summed_in_their_order(planes, expected, kernel_device):
    """2^24, 1 and -2^24: float32 loses the 1 if it comes second. The row itself is added last."""
    step = step_of(kernel_device, [planes], 3, 1, 1, torch.float32)
    step.x.fill_(1)
    step.a.fill_(0)
    step.a[:, 0] = 1
    step.b.fill_(0)
    step.b[::16, 0] = torch.tensor([2.0**24, 1.0, -(2.0**24)], device=kernel_device)
    step.scales[:] = 1
    step.out.fill_(0.5)
    assert step.run().item() == expected + 0.5


def test_the_bytes_that_must_move():
    """Three rows of one adapter of rank 16 and one of rank 32 with 4096 inputs in two chunks, counted by hand."""
    rows, planes = np.array([0, 2, 5, 6, 6]), np.array([3, 3, 3, 0, 1])
    segments = segment(rows, planes, None, torch.device("cpu"))
    y = 2 * 5 * 16 * 4
    x_and_a = (4 * 4096 + 3 * 4096 * 16) * 2
    assert lora_sgmv.shrink_bytes(segments, 4096, torch.bfloat16) == x_and_a + y
    out_and_b = (2 * 4 * 1000 + 3 * 16 * 1000) * 2
    assert lora_sgmv.expand_bytes(segments, 2, 1000, torch.bfloat16) == out_and_b + y
