"""Cases of what lies between a layer's products: norm, norm with residual, rotary embedding, gated activation, and the
rotation of blocks before 8-bit products."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Function, Sizes, Work, pairs, randn, rows_of
from torch import Tensor

EPS = 1e-5
ROTATED = 64
"""Channels a block: the most."""


def cases(sizes: Sizes) -> Iterator[Case]:
    makers: dict[tuple[str, str], Callable[[Sizes, int, torch.device], Work]] = {
        ("rms_norm", ""): _norm,
        ("rms_norm", "and residual, "): _add_norm,
        ("rotary", ""): _rotary,
        ("gated_activation", ""): _gate,
        ("hadamard", ""): _rotated_blocks,
    }
    largest = max(sizes.layer_rows)
    for (kernel, what), make in makers.items():
        for count in sizes.layer_rows:
            yield Case(
                kernel,
                what + rows_of(count),
                partial(make, sizes, count),
                is_quick=count == largest,
                is_compiled=count == largest,
            )


def _norm(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.rms_norm import rms_norm, rms_norm_bytes, rms_norm_reference

    x = randn(count, sizes.hidden, seed=0, device=device, dtype=sizes.dtype)
    weight = randn(sizes.hidden, seed=1, device=device, dtype=sizes.dtype)
    return Work(
        kernel=lambda: rms_norm(x, weight, EPS, rounds_first=True),
        reference=lambda: rms_norm_reference(x, weight, EPS, rounds_first=True),
        check=lambda: pairs(
            rms_norm(x, weight, EPS, rounds_first=True),
            rms_norm_reference(x.double(), weight.double(), EPS, rounds_first=True),
        ),
        num_bytes=rms_norm_bytes(count, sizes.hidden, sizes.dtype),
        usual=lambda: F.rms_norm(x, (sizes.hidden,), weight, EPS),
        libraries={
            "flashinfer": lambda: _flashinfer("rmsnorm", x, weight, EPS),
            "vllm": lambda: _vllm("rms_norm", torch.empty_like(x), x, weight, EPS),
        },
    )


def _add_norm(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm_bytes

    x, residual = (randn(count, sizes.hidden, seed=seed, device=device, dtype=sizes.dtype) for seed in (0, 2))
    weight = randn(sizes.hidden, seed=1, device=device, dtype=sizes.dtype)

    def usual() -> Any:
        total = x + residual
        return total, F.rms_norm(total, (sizes.hidden,), weight, EPS)

    return Work(
        kernel=lambda: add_rms_norm(x, residual, weight, EPS, rounds_first=True),
        reference=lambda: add_rms_norm_reference(x, residual, weight, EPS, rounds_first=True),
        check=lambda: pairs(
            add_rms_norm(x, residual, weight, EPS, rounds_first=True),
            add_rms_norm_reference(x, residual, weight, EPS, rounds_first=True),
        ),
        num_bytes=rms_norm_bytes(count, sizes.hidden, sizes.dtype, has_residual=True),
        usual=usual,
        # In place: sums of sums, whose time is the same.
        libraries={
            "flashinfer": lambda: _flashinfer("fused_add_rmsnorm", x.clone(), residual.clone(), weight, EPS),
            "vllm": lambda: _vllm("fused_add_rms_norm", x.clone(), residual.clone(), weight, EPS),
        },
        # A sum that is rounded otherwise, by the interpreter only, is one unit in the last place of what is normed.
        tolerance=4 * torch.finfo(sizes.dtype).eps,
    )


def _rotary(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.rotary import rotary, rotary_bytes, rotary_reference

    dtype = sizes.dtype
    q, k = (
        randn(1, count, heads, sizes.head, seed=heads, device=device, dtype=dtype).transpose(1, 2)
        for heads in (sizes.heads, sizes.kv_heads)
    )
    steps = torch.arange(0, sizes.head, 2, device=device) / sizes.head
    angles = torch.arange(count, device=device)[:, None] * 10000.0**-steps
    angles = torch.cat((angles, angles), dim=-1)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def check() -> list[tuple[Tensor, Tensor]]:
        wide = [part.double() for part in (q, k, cos, sin)]
        return pairs(rotary(q, k, cos, sin), rotary_reference(*wide))

    def usual() -> Any:
        first, second = cos[:, None], sin[:, None]
        return [part * first + _half_turned(part) * second for part in (q, k)]

    return Work(
        kernel=lambda: rotary(q, k, cos, sin),
        reference=lambda: rotary_reference(q, k, cos, sin),
        check=check,
        num_bytes=rotary_bytes(count, sizes.heads + sizes.kv_heads, sizes.head, sizes.head, dtype),
        usual=usual,
    )


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _gate(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.gated_activation import (
        gated_activation,
        gated_activation_bytes,
        gated_activation_reference,
    )

    merged = randn(count, 2 * sizes.inner, seed=0, device=device, dtype=sizes.dtype)
    gate, up = merged.chunk(2, dim=-1)

    def check() -> list[tuple[Tensor, Tensor]]:
        true = gated_activation_reference(gate.double(), up.double(), "silu")
        return pairs(gated_activation(gate, up, "silu"), true)

    return Work(
        kernel=lambda: gated_activation(gate, up, "silu"),
        reference=lambda: gated_activation_reference(gate, up, "silu"),
        check=check,
        num_bytes=gated_activation_bytes(count, sizes.inner, sizes.dtype),
        usual=lambda: F.silu(gate) * up,
        libraries={
            "flashinfer": lambda: _flashinfer("silu_and_mul", merged),
            "vllm": lambda: _vllm("silu_and_mul", torch.empty_like(up), merged),
        },
    )


def _rotated_blocks(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.hadamard import rotate_blocks, rotate_blocks_bytes, rotate_blocks_reference

    x = randn(count, sizes.hidden, seed=0, device=device, dtype=sizes.dtype)
    matrix = rotate_blocks_reference(torch.eye(ROTATED, device=device), ROTATED, 1.0)

    def usual() -> Tensor:
        blocks = x.float().unflatten(-1, (-1, ROTATED))
        return ((blocks @ matrix).flatten(-2) / 8).to(x.dtype)

    return Work(
        kernel=lambda: rotate_blocks(x, ROTATED, 0.125),
        reference=lambda: rotate_blocks_reference(x, ROTATED, 0.125),
        check=lambda: pairs(
            rotate_blocks(x, ROTATED, 0.125), rotate_blocks_reference(x.double(), ROTATED, 0.125)
        ),
        num_bytes=rotate_blocks_bytes(x),
        usual=usual,
    )


def _flashinfer(name: str, *args: Any) -> Function:
    import flashinfer  # type: ignore[import-not-found]

    function = getattr(flashinfer, name)
    return lambda: function(*args)


def _vllm(name: str, *args: Any) -> Function:
    import vllm._custom_ops  # type: ignore[import-not-found]  # registers torch.ops._C

    assert vllm is not None
    function = getattr(torch.ops._C, name)
    return lambda: function(*args)
