"""The rotary embedding against float64, in Triton's interpreter and, where there is one, on a GPU."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import rotary as kernels

UNITS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""The relative error of one rounding; bfloat16's is that of the interpreter, which truncates."""

PAIRINGS = ["halves", "halves_of_pairs", "neighbours", "neighbours_by_halves"]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def truth_of(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Pair by pair as the table in the kernel's docstring says, float64."""
    rot = cos.shape[2] * (2 if pairing == "halves_of_pairs" else 1)
    x, cos, sin = (part.double().cpu() for part in (x, cos[:, None], sin[:, None]))
    out = x.clone()
    for i in range(rot // 2):
        a, b = (i, i + rot // 2) if pairing.startswith("halves") else (2 * i, 2 * i + 1)
        at_a, at_b = (i, i) if pairing in ("halves_of_pairs", "neighbours_by_halves") else (a, b)
        out[..., a] = x[..., a] * cos[..., at_a] - x[..., b] * sin[..., at_a]
        out[..., b] = x[..., b] * cos[..., at_b] + x[..., a] * sin[..., at_b]
    return out


def assert_close(result: Tensor, truth: Tensor) -> None:
    assert result.shape == truth.shape
    assert result.transpose(1, 2).is_contiguous()
    allowed = UNITS[result.dtype] * 1.01 * truth.abs() + 2e-6
    assert ((result.cpu().double() - truth).abs() <= allowed).all()


CASES = {
    "all of a head": (8, 2, 3, 64, 64),
    "more heads than a program has, one left": (17, 1, 2, 128, 128),
    "a part of a head": (3, 3, 2, 80, 32),
    "no powers of two": (5, 1, 2, 96, 96),
    "one token, one pair": (1, 1, 1, 2, 2),
}
"""H, Hkv, T, D, rot."""


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_it_equals_float64(name, dtype, pairing, kernel_device):
    heads, kv_heads, tokens, dim, rot = CASES[name]
    q = random(1, tokens, heads, dim, dtype=dtype, device=kernel_device, seed=1).transpose(1, 2)
    k = random(1, tokens, kv_heads, dim, dtype=dtype, device=kernel_device, seed=2).transpose(1, 2)
    width = rot // 2 if pairing == "halves_of_pairs" else rot
    cos, sin = (random(1, tokens, width, dtype=dtype, device=kernel_device, seed=seed) for seed in (3, 4))
    for x, result in zip((q, k), kernels.rotary(q, k, cos, sin, pairing=pairing), strict=True):
        assert_close(result, truth_of(x, cos, sin, pairing))
    wide = [part.double() for part in (q, k, cos, sin)]
    for x, result in zip((q, k), kernels.rotary_reference(*wide, pairing=pairing), strict=True):
        assert torch.allclose(result.cpu(), truth_of(x, cos, sin, pairing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_heads_of_a_merged_product(pairing, triton_interpreter, kernel_device):
    """NaN between the rows, in what follows a head, and in the angles beside those of the tokens."""

    def around(values: Tensor) -> Tensor:
        *leading, last = values.shape
        whole = triton_interpreter.poisoned(*leading, last + 8, device=str(kernel_device))
        whole[..., 4 : 4 + last] = values
        return whole[..., 4 : 4 + last]

    q = around(random(1, 3, 4, 40, dtype=torch.float32, device=kernel_device, seed=1)).transpose(1, 2)
    k = around(random(1, 3, 2, 40, dtype=torch.float32, device=kernel_device, seed=2)).transpose(1, 2)
    width = 12 if pairing == "halves_of_pairs" else 24
    cos, sin = (
        around(random(1, 3, width, dtype=torch.float32, device=kernel_device, seed=s)) for s in (3, 4)
    )
    for x, result in zip((q, k), kernels.rotary(q, k, cos, sin, pairing=pairing), strict=True):
        assert_close(result, truth_of(x, cos, sin, pairing))


def test_heads_may_lie_before_tokens(kernel_device):
    q, k = (random(1, heads, 3, 16, dtype=torch.float32, device=kernel_device) for heads in (4, 2))
    cos, sin = (random(1, 3, 16, dtype=torch.float32, device=kernel_device, seed=seed) for seed in (3, 4))
    for x, result in zip((q, k), kernels.rotary(q, k, cos, sin), strict=True):
        assert_close(result, truth_of(x, cos, sin, "halves"))


def test_a_turn_is_a_turn(kernel_device):
    """A quarter turn takes (1, 0) to (0, 1), and lengths stay as they are."""
    q = torch.zeros(1, 1, 2, 4, device=kernel_device)
    q[..., 0] = 1
    angle = torch.tensor([[[math.pi / 2, 0.3]], [[0.7, 0.1]]], device=kernel_device).view(1, 2, 2)
    both = torch.cat((angle, angle), dim=-1)
    turned, _ = kernels.rotary(q, q, both.cos(), both.sin())
    expected = torch.tensor([[0, 0, 1, 0], [math.cos(0.7), 0, math.sin(0.7), 0]])
    assert torch.allclose(turned[0, 0].cpu(), expected, atol=1e-6)


def test_a_token_is_the_same_bits_in_any_company(kernel_device):
    q, k = (random(1, heads, 5, 64, dtype=torch.bfloat16, device=kernel_device) for heads in (6, 2))
    cos, sin = (random(1, 5, 64, dtype=torch.bfloat16, device=kernel_device, seed=seed) for seed in (3, 4))
    together = kernels.rotary(q, k, cos, sin)
    for kept in ([2], [4, 0]):
        part = kernels.rotary(q[:, :, kept], k[:, :, kept], cos[:, kept], sin[:, kept])
        assert all(torch.equal(one, whole[:, :, kept]) for one, whole in zip(part, together, strict=True))


def test_no_tokens_give_no_tokens(kernel_device):
    q, k = (torch.empty(1, heads, 0, 8, device=kernel_device) for heads in (4, 2))
    angles = torch.empty(1, 0, 8, device=kernel_device)
    assert [part.shape for part in kernels.rotary(q, k, angles, angles)] == [(1, 4, 0, 8), (1, 2, 0, 8)]


def test_the_bytes_that_must_move():
    """Three tokens of eight query and two key heads."""
    moved = kernels.rotary_bytes(3, 10, 64, 32, torch.bfloat16)
    assert moved == (2 * 3 * 10 * 64 + 2 * 3 * 32) * 2
