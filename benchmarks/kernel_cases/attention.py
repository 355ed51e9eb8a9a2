"""Cases over the KV cache: decode attention, prefill attention and the writing of new keys and values.

Blocks of the cache are in random order. The usual torch is scaled_dot_product_attention over keys and values that
already lie side by side, which a paged cache does not offer: what a block table costs is to be seen, not hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Function, Sizes, Target, Work, pairs, randn, rows_of
from torch import Tensor


def cases(sizes: Sizes) -> Iterator[Case]:
    largest = max(sizes.batches)
    for count in sizes.batches:
        yield Case(
            "decode_attention",
            f"{rows_of(count)} of {sizes.context} keys",
            partial(_decode, sizes, partial(_separate, sizes, count, sizes.context), sizes.context),
            is_quick=count == largest,
            is_compiled=count == largest,
            targets=(Target("bandwidth", 0.75),) if count > 1 else (),
        )
    total = sizes.context + sizes.own
    yield Case(
        "decode_attention",
        f"{sizes.samples} samples of {sizes.context} + {sizes.own} keys, shared",
        partial(_decode, sizes, partial(_shared, sizes), total),
    )
    yield Case(
        "decode_attention",
        f"{sizes.samples} samples of {sizes.context} + {sizes.own} keys, apart",
        partial(_decode, sizes, partial(_separate, sizes, sizes.samples, total), total),
        is_quick=False,
    )
    yield Case(
        "prefill_attention",
        f"{sizes.prompt} tokens",
        partial(_prefill, sizes, 0),
        is_compiled=True,
    )
    yield Case(
        "prefill_attention",
        f"{sizes.prompt - sizes.cached} tokens behind {sizes.cached} cached",
        partial(_prefill, sizes, sizes.cached),
        is_quick=False,
    )
    for count in sizes.layer_rows:
        yield Case(
            "kv_write",
            rows_of(count),
            partial(_write, sizes, count),
            is_quick=count == max(sizes.layer_rows),
            is_compiled=count == max(sizes.layer_rows),
        )


Tables = Sequence[Sequence[int]]


def _separate(sizes: Sizes, count: int, length: int) -> Tables:
    """Each row has its own blocks."""
    per_row = -(-length // sizes.block_size)
    order = torch.randperm(count * per_row, generator=torch.Generator().manual_seed(3))
    tables: list[list[int]] = order.view(count, per_row).tolist()
    return tables


def _shared(sizes: Sizes) -> Tables:
    """All rows have the blocks of the prefix in common."""
    prefix, own = (-(-length // sizes.block_size) for length in (sizes.context, sizes.own))
    order: list[int] = torch.randperm(
        prefix + sizes.samples * own, generator=torch.Generator().manual_seed(3)
    ).tolist()
    ends = [order[prefix + number * own :][:own] for number in range(sizes.samples)]
    return [order[:prefix] + end for end in ends]


def _decode(sizes: Sizes, make_tables: Callable[[], Tables], length: int, device: torch.device) -> Work:
    from cadenza.kernels.decode_attention import (
        decode_attention,
        decode_attention_bytes,
        decode_attention_reference,
    )
    from cadenza.kernels.decode_work import plan_decode

    tables = make_tables()
    keys, values = _cache(sizes, 1 + max(map(max, tables)), device)
    q = randn(len(tables), sizes.heads, sizes.head, seed=2, device=device, dtype=sizes.dtype)
    plan = plan_decode(tables, [length - 1] * len(tables), sizes.block_size, sizes.heads // sizes.kv_heads)
    work, scale = plan.upload(device), sizes.head**-0.5

    def check() -> list[tuple[Tensor, Tensor]]:
        true = decode_attention_reference(q.double(), keys.double(), values.double(), work, scale=scale)
        return pairs(decode_attention(q, keys, values, work, scale=scale), true)

    table = torch.tensor(tables, device=device)
    k, v = (part[table].flatten(1, 2)[:, :length].transpose(1, 2) for part in (keys, values))

    def usual() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)

    return Work(
        kernel=lambda: decode_attention(q, keys, values, work, scale=scale),
        reference=lambda: decode_attention_reference(q, keys, values, work, scale=scale),
        check=check,
        num_bytes=decode_attention_bytes(q, keys, values, work),
        usual=usual,
        libraries={"flashinfer": lambda: _flashinfer(sizes, q, keys, values, tables, length)},
        tolerance=None if q.dtype == torch.float32 else 0.04,
    )


def _flashinfer(
    sizes: Sizes, q: Tensor, keys: Tensor, values: Tensor, tables: Tables, length: int
) -> Function:
    import flashinfer  # type: ignore[import-not-found]

    space = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    per_row = len(tables[0])
    count = len(tables)
    firsts = torch.arange(count + 1, dtype=torch.int32, device=q.device) * per_row
    ids = torch.tensor(tables, dtype=torch.int32, device=q.device).flatten()
    last = torch.full((count,), length - (per_row - 1) * sizes.block_size, dtype=torch.int32, device=q.device)
    shape = (sizes.heads, sizes.kv_heads, sizes.head, sizes.block_size)
    wrapper.plan(firsts, ids, last, *shape, q_data_type=q.dtype, kv_data_type=keys.dtype)
    return lambda: wrapper.run(q, (keys, values))


def _prefill(sizes: Sizes, start: int, device: torch.device) -> Work:
    from cadenza.kernels.prefill_attention import (
        prefill_attention,
        prefill_attention_bytes,
        prefill_attention_flops,
        prefill_attention_reference,
    )
    from cadenza.kernels.prefill_work import PrefillWork, plan_prefill

    count = sizes.prompt - start
    tables = _separate(sizes, 1, sizes.prompt)
    keys, values = _cache(sizes, len(tables[0]), device)
    q = randn(count, sizes.heads, sizes.head, seed=2, device=device, dtype=sizes.dtype)
    plan = plan_prefill(tables, [start], [0], [count], sizes.block_size)
    work, scale = PrefillWork.of(plan, device), sizes.head**-0.5
    shape = (sizes.heads, sizes.head, sizes.head)
    table, group = torch.tensor(tables[0], device=device), sizes.heads // sizes.kv_heads
    k, v = (
        part[table]
        .flatten(0, 1)[: sizes.prompt]
        .repeat_interleave(group, 1)
        .transpose(0, 1)[None]
        .contiguous()
        for part in (keys, values)
    )
    queries = q.transpose(0, 1)[None].contiguous()

    def usual() -> Tensor:
        if not start:
            return F.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale)
        from torch.nn.attention.bias import causal_lower_right

        mask: Any = causal_lower_right(count, sizes.prompt)
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)

    return Work(
        kernel=lambda: prefill_attention(q, keys, values, work, scale=scale),
        reference=lambda: prefill_attention_reference(q, keys, values, work, scale=scale),
        # In float32, which the reference computes in: float64 of all scores might not fit.
        check=lambda: pairs(
            prefill_attention(q, keys, values, work, scale=scale),
            prefill_attention_reference(q.float(), keys, values, work, scale=scale),
        ),
        num_bytes=prefill_attention_bytes(plan, sizes.heads, sizes.kv_heads, *shape[1:], sizes.dtype),
        num_flops=prefill_attention_flops(plan, *shape),
        usual=usual,
        tolerance=None if q.dtype == torch.float32 else 0.04,
    )


def _write(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.kv_write import write_kv, write_kv_bytes, write_kv_reference

    shape = (count, sizes.kv_heads, sizes.head)
    key, value = (randn(*shape, seed=seed, device=device, dtype=sizes.dtype) for seed in (5, 6))
    num_blocks = -(-count // sizes.block_size) + 4
    slots = torch.randperm(num_blocks * sizes.block_size, generator=torch.Generator().manual_seed(3))[:count]
    slots = slots.to(device)
    cache = _cache(sizes, num_blocks, device)

    def check() -> list[tuple[Tensor, Tensor]]:
        written, true = ([part.clone() for part in cache] for _ in range(2))
        write_kv(written[0], written[1], slots, key, value)
        write_kv_reference(true[0], true[1], slots, key, value)
        return pairs(written, true)

    return Work(
        kernel=lambda: write_kv(*cache, slots, key, value),
        reference=lambda: write_kv_reference(*cache, slots, key, value),
        check=check,
        num_bytes=write_kv_bytes(*shape, sizes.head, sizes.dtype),
    )


def _cache(sizes: Sizes, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (num_blocks, sizes.block_size, sizes.kv_heads, sizes.head)
    keys, values = (randn(*shape, seed=seed, device=device, dtype=sizes.dtype) for seed in (0, 1))
    return keys, values
