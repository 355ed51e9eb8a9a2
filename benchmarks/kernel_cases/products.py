"""Cases of products with weights: LoRA's two, and weights of 8 and 4 bits.

The usual torch of the latter is cuBLAS's product with the weight in the dtype of the rows, which reads two or four
times as much; of the former a loop over rows, each with its adapter, as peft would compute them one after the other.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from kernel_cases.case import Case, Sizes, Work, integers, pairs, randn, rows_of
from torch import Tensor

GROUP_SIZE = 128


def cases(sizes: Sizes) -> Iterator[Case]:
    rows = sizes.samples
    for num_adapters in (rows, 1):
        for kernel in ("shrink", "expand"):
            what = f"{kernel}, {rows_of(rows)} of {num_adapters} adapter{'s' if num_adapters > 1 else ''}"
            yield Case(
                "lora_sgmv",
                what,
                partial(_lora, sizes, kernel, rows, num_adapters),
                is_quick=num_adapters > 1,
                is_compiled=num_adapters > 1,
            )
    largest = max(sizes.product_rows)
    for kernel, make in (("int8_matmul", _int8), ("int4_matmul", _int4)):
        for outputs in (sizes.hidden, 2 * sizes.inner):
            for count in sizes.product_rows:
                yield Case(
                    kernel,
                    f"{rows_of(count)} times {outputs} x {sizes.hidden}",
                    partial(make, sizes, count, outputs),
                    is_quick=count == 1 and outputs > sizes.hidden,
                    is_compiled=count == largest and outputs > sizes.hidden,
                )


def _lora(sizes: Sizes, kernel: str, num_rows: int, num_adapters: int, device: torch.device) -> Work:
    from cadenza.kernels import lora_sgmv
    from cadenza.kernels.lora import PLANE
    from cadenza.kernels.lora_segments import segment

    width, dtype = sizes.hidden, sizes.dtype
    uses = np.arange(num_rows)
    segments = segment(uses, uses % num_adapters, None, device)
    a = randn(num_adapters * width, PLANE, seed=0, device=device, dtype=dtype, scale=width**-0.5)
    b = randn(num_adapters * PLANE, width, seed=1, device=device, dtype=dtype)
    x = randn(num_rows, width, seed=2, device=device, dtype=dtype)
    y = lora_sgmv.shrink_reference(x.float(), a.float(), segments)
    out = torch.zeros(num_rows, width, dtype=dtype, device=device)
    if kernel == "shrink":
        first, second = a.view(num_adapters, width, PLANE), segments.planes.tolist()
        return Work(
            kernel=lambda: lora_sgmv.shrink(x, a, segments),
            reference=lambda: lora_sgmv.shrink_reference(x, a, segments),
            check=lambda: pairs(
                lora_sgmv.shrink(x, a, segments).sum(0),
                lora_sgmv.shrink_reference(x.double(), a.double(), segments).sum(0),
            ),
            num_bytes=lora_sgmv.shrink_bytes(segments, width, dtype),
            usual=lambda: [x[row] @ first[plane] for row, plane in enumerate(second)],
            tolerance=1e-4,
        )
    planes = b.view(num_adapters, PLANE, width)
    shrunk = y[0].to(dtype)
    chunks = lora_sgmv.shrink(x, a, segments).shape[0]
    parts = torch.zeros(chunks, num_rows, PLANE, device=device)
    parts[0] = y[0]

    def check() -> list[tuple[Tensor, Tensor]]:
        added, true = x.clone(), x.double()
        lora_sgmv.expand_(added, parts, b, segments)
        lora_sgmv.expand_reference_(true, y.double(), b.double(), segments)
        return [(added, true)]

    def usual() -> None:
        for row, plane in enumerate(segments_planes):
            out[row] += shrunk[row] @ planes[plane]

    segments_planes = segments.planes.tolist()
    return Work(
        kernel=lambda: lora_sgmv.expand_(out, parts, b, segments),
        reference=lambda: lora_sgmv.expand_reference_(out, shrunk[None], b, segments),
        check=check,
        num_bytes=lora_sgmv.expand_bytes(segments, chunks, width, dtype),
        usual=usual,
    )


def _int8(sizes: Sizes, count: int, outputs: int, device: torch.device) -> Work:
    from cadenza.kernels.int8_matmul import int8_matmul, int8_matmul_bytes, int8_matmul_reference

    width, dtype = sizes.hidden, sizes.dtype
    weight = (integers(outputs, width, seed=0, high=255, device=device, dtype=torch.int16) - 127).to(
        torch.int8
    )
    scale = randn(outputs, seed=1, device=device, dtype=torch.float32).abs_()
    x = randn(count, width, seed=2, device=device, dtype=dtype, scale=0.01)
    dense = (weight * scale[:, None]).to(dtype)
    return Work(
        kernel=lambda: int8_matmul(x, weight, scale, None),
        reference=lambda: int8_matmul_reference(x, weight, scale, None),
        check=lambda: pairs(
            int8_matmul(x, weight, scale, None),
            int8_matmul_reference(x.double(), weight, scale.double(), None),
        ),
        num_bytes=int8_matmul_bytes(count, outputs, width, dtype),
        usual=lambda: x @ dense.T,
    )


def _int4(sizes: Sizes, count: int, outputs: int, device: torch.device) -> Work:
    from cadenza.kernels.int4_matmul import int4_matmul, int4_matmul_bytes, int4_matmul_reference
    from cadenza.kernels.int4_words import dequantize_reference, pack

    width, dtype, num_groups = sizes.hidden, sizes.dtype, -(-sizes.hidden // GROUP_SIZE)
    words = pack(integers(outputs, width, seed=0, high=16, device=device, dtype=torch.uint8))
    factors = randn(num_groups, outputs, 2, seed=1, device=device, dtype=torch.bfloat16, scale=0.1)
    x = randn(count, width, seed=2, device=device, dtype=dtype, scale=0.1)
    dense = dequantize_reference(words, factors, GROUP_SIZE, width, dtype)
    return Work(
        kernel=lambda: int4_matmul(x, words, factors, GROUP_SIZE, None),
        reference=lambda: int4_matmul_reference(x, words, factors, GROUP_SIZE, None),
        check=lambda: pairs(
            int4_matmul(x, words, factors, GROUP_SIZE, None),
            int4_matmul_reference(x.double(), words, factors, GROUP_SIZE, None),
        ),
        num_bytes=int4_matmul_bytes(count, outputs, width, GROUP_SIZE, dtype),
        usual=lambda: x @ dense.T,
    )
