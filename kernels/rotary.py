"""Rotary position embedding (Su et al. 2021, "RoFormer") of queries and keys, one launch for both.

Of each head's D elements the first `rot` are rotated in pairs, the rest is left as it is:

    out[a] = x[a] · cos[a'] - x[b] · sin[a']
    out[b] = x[b] · cos[b'] + x[a] · sin[b']

    pairing                 a, b               a', b'
    "halves"                i, i + rot/2       i, i + rot/2     GPT-NeoX's, and so Llama's
    "neighbours"            2i, 2i + 1         2i, 2i + 1       GPT-J's, and so Cohere's
    "halves_of_pairs"       i, i + rot/2       i, i             GPT-OSS's: cos and sin have rot/2 columns
    "neighbours_by_halves"  2i, 2i + 1         i, i             GLM's: the second half of cos and sin is not read

The kernel computes in float32 and rounds once. transformers' functions mostly round both products and their sum to the
dtype; in 16 bit the two therefore differ in the last places, the kernel being the more exact.

Knows nothing of positions, of frequencies or of layers. Imports Triton, which only Linux has: import it where there is
a GPU.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Pairing = Literal["halves", "halves_of_pairs", "neighbours", "neighbours_by_halves"]

TILE = 1024
"""Elements of one program, heads of one token."""

# Chosen by arithmetic and by what compiles without spilling; not measured on a GPU.
OPTIONS = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, pairing: Pairing = "halves"
) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D] and k [1, Hkv, T, D], rotated; cos and sin [1, T, rot] or, of pairs, [1, T, rot/2], rot even
    and at most D.

    q and k of one dtype, cos and sin of one dtype, the elements of a head and of an angle next to each other. The
    results have q's dtype and lie token by token: `result.transpose(1, 2)` is contiguous.
    """
    _, num_heads, num_tokens, head_dim = q.shape
    num_kv_heads, rot = k.shape[1], rotated_width(cos, pairing)
    assert pairing in get_args(Pairing)
    assert q.shape[0] == 1
    assert k.shape == (1, num_kv_heads, num_tokens, head_dim)
    assert cos.shape == sin.shape == (1, num_tokens, cos.shape[2])
    assert rot % 2 == 0
    assert 0 < rot <= head_dim
    assert q.dtype == k.dtype
    assert cos.dtype == sin.dtype
    assert all(part.stride(-1) == 1 for part in (q, k, cos, sin))
    rotated_q, rotated_k = (
        torch.empty(1, num_tokens, heads, head_dim, dtype=q.dtype, device=q.device)
        for heads in (num_heads, num_kv_heads)
    )
    heads = max(1, TILE // triton.next_power_of_2(head_dim))
    q_programs, k_programs = -(-num_heads // heads), -(-num_kv_heads // heads)
    if num_tokens and q_programs + k_programs:
        _rotary_kernel[(num_tokens, q_programs + k_programs)](
            *(q, _step(q, 2), q.stride(1), rotated_q, k, _step(k, 2), k.stride(1), rotated_k),
            *(cos, _step(cos, 1), sin, _step(sin, 1)),
            *(num_heads, num_kv_heads, head_dim, rot, heads, q_programs),
            *(triton.next_power_of_2(rot // 2), triton.next_power_of_2(max(1, head_dim - rot)), pairing),
            **OPTIONS,
        )
    return rotated_q.transpose(1, 2), rotated_k.transpose(1, 2)


def rotated_width(cos: Tensor, pairing: Pairing) -> int:
    """Elements of a head that are rotated."""
    return cos.shape[2] * (2 if pairing == "halves_of_pairs" else 1)


def _step(x: Tensor, dimension: int) -> int:
    """From one token to the next. Where there is one only, any number is right, and 1 would be compiled anew."""
    return x.stride(dimension) if x.shape[dimension] > 1 else 0


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, pairing: Pairing = "halves"
) -> tuple[Tensor, Tensor]:
    """`rotary` in plain torch, in float32 or the widest dtype of its arguments, rounded once."""
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    rot = rotated_width(cos, pairing)
    if pairing == "halves_of_pairs":
        cos, sin = (torch.cat((part, part), dim=-1) for part in (cos, sin))
    if pairing == "neighbours_by_halves":
        cos, sin = (part[..., : rot // 2].repeat_interleave(2, dim=-1) for part in (cos, sin))
    cos, sin = (part[:, None].to(wide) for part in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        turning = x[..., :rot].to(wide)
        if pairing.startswith("halves"):
            first, second = turning.chunk(2, dim=-1)
            across = torch.cat((-second, first), dim=-1)
        else:
            across = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
        return torch.cat(((turning * cos + across * sin).to(x.dtype), x[..., rot:]), dim=-1)

    return rotated(q), rotated(k)


def rotary_bytes(num_tokens: int, num_heads: int, head_dim: int, rot: int, dtype: torch.dtype) -> int:
    """What memory must move: heads, those of keys included, in and out, and cos and sin."""
    return 2 * num_tokens * (num_heads * head_dim + rot) * dtype.itemsize


@triton.jit  # type: ignore[untyped-decorator]
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, q_token_stride, q_head_stride, q_out, k, k_token_stride, k_head_stride, k_out,
    cos, cos_stride, sin, sin_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ROT: tl.constexpr, HEADS: tl.constexpr,
    Q_PROGRAMS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, PAIRING: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): those of queries first."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos += token * cos_stride
    sin += token * sin_stride
    if block < Q_PROGRAMS:
        head = tl.arange(0, HEADS) + block * HEADS
        _rotate(
            q + token * q_token_stride, q_head_stride, q_out + token * (Q_HEADS * DIM), cos, sin,
            head, Q_HEADS, DIM, ROT, HEADS, HALF_BLOCK, REST_BLOCK, PAIRING,
        )  # fmt: skip
    else:
        head = tl.arange(0, HEADS) + (block - Q_PROGRAMS) * HEADS
        _rotate(
            k + token * k_token_stride, k_head_stride, k_out + token * (K_HEADS * DIM), cos, sin,
            head, K_HEADS, DIM, ROT, HEADS, HALF_BLOCK, REST_BLOCK, PAIRING,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x, head_stride, out, cos, sin, head,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, ROT: tl.constexpr, HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, PAIRING: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    HALF: tl.constexpr = ROT // 2
    is_head = (head < NUM_HEADS)[:, None]
    x += head.to(tl.int64)[:, None] * head_stride
    out += head[:, None] * DIM
    pair = tl.arange(0, HALF_BLOCK)
    if PAIRING == "halves" or PAIRING == "halves_of_pairs":
        AT_B: tl.constexpr = HALF if PAIRING == "halves" else 0
        is_pair = pair < HALF
        is_ours = is_head & is_pair[None, :]
        a = tl.load(x + pair[None, :], mask=is_ours, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + pair[None, :], mask=is_ours, other=0.0).to(tl.float32)
        cos_a = tl.load(cos + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        cos_b = tl.load(cos + AT_B + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        sin_a = tl.load(sin + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        sin_b = tl.load(sin + AT_B + pair, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        tl.store(out + pair[None, :], (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=is_ours)
        tl.store(out + HALF + pair[None, :], (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=is_ours)
    else:
        element = tl.arange(0, 2 * HALF_BLOCK)
        is_ours = is_head & (element < ROT)[None, :]
        loaded = tl.load(x + element[None, :], mask=is_ours, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(loaded, (HEADS, HALF_BLOCK, 2)))
        cos_a, cos_b = _angles(cos, ROT, HALF_BLOCK, PAIRING)
        sin_a, sin_b = _angles(sin, ROT, HALF_BLOCK, PAIRING)
        rotated = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        rotated = tl.reshape(rotated, (HEADS, 2 * HALF_BLOCK))
        tl.store(out + element[None, :], rotated.to(out.dtype.element_ty), mask=is_ours)
    if ROT < DIM:
        rest = tl.arange(0, REST_BLOCK) + ROT
        is_rest = is_head & (rest < DIM)[None, :]
        tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=is_rest, other=0.0), mask=is_rest)


@triton.jit  # type: ignore[untyped-decorator]
def _angles(table, ROT: tl.constexpr, HALF_BLOCK: tl.constexpr, PAIRING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of pairs' first and second elements, each [1, pairs]."""
    if PAIRING == "neighbours":
        element = tl.arange(0, 2 * HALF_BLOCK)
        values = tl.load(table + element, mask=element < ROT, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(values, (HALF_BLOCK, 2)))
    else:
        pair = tl.arange(0, HALF_BLOCK)
        first = tl.load(table + pair, mask=pair < ROT // 2, other=0.0).to(tl.float32)
        second = first
    return first[None, :], second[None, :]
