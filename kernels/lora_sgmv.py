"""The products of `kernels.lora` for GPUs, in Triton: low-rank changes of many adapters over one batch.

Rows that use the same planes in the same order, of whichever requests, are grouped into tiles of 16 lanes, the height
of a tensor core's product. So a prompt's rows share what is read of an adapter, as in Punica's SGMV (Chen et al. 2023),
and a decode row alone reads no more than S-LoRA's matrix-vector kernel (Sheng et al. 2023) does: empty lanes are
masked. There is one code path for 1 row and for 10 000, which gives every row this order of summation:

    y[s, u] = x[rows[u], chunk s] @ A[planes[u], chunk s]      float32, one block of in_features after another
    out[r]  = out[r] + Σ_u scales[u] · (Σ_s y[s, u]) @ B[planes[u]]     over u with rows[u] = r, ascending, in float32

Chunks depend on in_features alone, nothing is added atomically, and no lane reads another's numbers. A row's result is
therefore the same bits whatever the batch holds, provided that the hardware treats the 16 rows of a product alike.

Tables are those of `kernels.lora`: A [planes * in_features, 16] and B [planes * 16, out_features], contiguous, of one
dtype: float32, bfloat16 or float16; everything is on the current device. Knows nothing of adapters' names, slots or
layers. Imports Triton, which only Linux has: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.lora import PLANE
from cadenza.kernels.lora_segments import LANES, Segments
from cadenza.kernels.ops import is_interpreted

CHUNK = 2048
"""The most inputs that one program sums: 64 KB of a plane in 16 bit, about a microsecond's reading by one processor."""

EXPAND_BLOCK = 256
"""Outputs per program of `expand_`."""

# Fusion of products and sums is said, because Triton's default changes with its version, and the last bit with it.
SHRINK_OPTIONS = {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}
EXPAND_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def shrink(x: Tensor, a: Tensor, segments: Segments) -> Tensor:
    """[chunks, n, 16] float32: each use's row of x times its plane of A, as sums over chunks of in_features.

    x: [T, in_features], rows at any distance, of a's dtype.
    """
    in_features = x.shape[1]
    assert x.dtype == a.dtype
    assert x.stride(1) == 1
    assert a.is_contiguous()
    assert a.shape[1] == PLANE
    num_chunks, chunk, block = _chunks(in_features, x.dtype)
    n = len(segments.rows)
    y = torch.empty(num_chunks, n, PLANE, dtype=torch.float32, device=x.device)
    if n:
        _shrink_kernel[(len(segments.pieces), num_chunks)](
            *(x, x.stride(0), a, y, n),
            *(segments.rows, segments.planes, segments.firsts, segments.pieces),
            *(in_features, chunk, block, PLANE, LANES, is_interpreted(x)),
            **SHRINK_OPTIONS,
        )
    return y


def expand_(out: Tensor, y: Tensor, b: Tensor, segments: Segments) -> None:
    """Add each use's y (`shrink`'s), scaled, times its plane of B to its row of out, in place.

    out: [T, out_features], rows at any distance, float32, bfloat16 or float16; rounded once. Rows without uses are
    neither read nor written.
    """
    out_features = out.shape[1]
    assert out.stride(1) == 1
    assert b.is_contiguous()
    assert b.shape[1] == out_features
    n = len(segments.rows)
    if n:
        _expand_kernel[(len(segments.lengths), -(-out_features // EXPAND_BLOCK))](
            *(out, out.stride(0), y, n, b),
            *(segments.rows, segments.planes, segments.scales, segments.firsts, segments.lengths),
            *(out_features, y.shape[0], EXPAND_BLOCK, PLANE, LANES, _precision(b.dtype)),
            **EXPAND_OPTIONS,
        )


def shrink_reference(x: Tensor, a: Tensor, segments: Segments) -> Tensor:
    """`shrink` in plain torch, in the dtype of its arguments (float64 for a truth): [1, n, 16]."""
    planes = a.view(-1, x.shape[1], PLANE)[segments.planes.long()]
    return torch.einsum("ui,uir->ur", x[segments.rows.long()], planes)[None]


def expand_reference_(out: Tensor, y: Tensor, b: Tensor, segments: Segments) -> None:
    """`expand_` in plain torch, in the dtype of its arguments."""
    planes = b.view(-1, PLANE, b.shape[1])[segments.planes.long()]
    scaled = y.sum(0) * segments.scales[:, None].to(y.dtype)
    out.index_add_(0, segments.rows.long(), torch.einsum("ur,uro->uo", scaled, planes))


def shrink_bytes(segments: Segments, in_features: int, dtype: torch.dtype) -> int:
    """What memory must move for `shrink`: rows and planes once each (tiles share planes through the cache), and y."""
    num_chunks, _, _ = _chunks(in_features, dtype)
    read = (segments.num_users + segments.num_planes * PLANE) * in_features * dtype.itemsize
    return read + num_chunks * len(segments.rows) * PLANE * 4


def expand_bytes(segments: Segments, num_chunks: int, out_features: int, dtype: torch.dtype) -> int:
    """What memory must move for `expand_`: y and planes once each, rows of out there and back."""
    moved = (2 * segments.num_users + segments.num_planes * PLANE) * out_features * dtype.itemsize
    return moved + num_chunks * len(segments.rows) * PLANE * 4


# Names of arguments, not shapes: x and out are [T, features] with a row stride in elements; the rest as in `Segments`.


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _shrink_kernel(  # type: ignore[no-untyped-def]
    x, x_stride, a, y, n, rows, planes, firsts, pieces,
    IN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PLANE: tl.constexpr, LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (piece, chunk): 16 rows' sums over one chunk of inputs."""
    piece = tl.program_id(0)
    chunk = tl.program_id(1)
    tile = tl.load(pieces + piece * 2)
    term = tl.load(pieces + piece * 2 + 1)
    first = tl.load(firsts + tile * LANES + tl.arange(0, LANES))
    is_used = first >= 0
    row = tl.load(rows + first + term, mask=is_used, other=0).to(tl.int64)
    # One plane for all lanes: that is what a tile is.
    plane = tl.load(planes + tl.load(firsts + tile * LANES) + term).to(tl.int64)
    rank = tl.arange(0, PLANE)
    total = tl.full((LANES, PLANE), 0.0, tl.float32)
    for start in range(0, CHUNK, BLOCK):
        column = tl.arange(0, BLOCK) + (chunk * CHUNK + start)
        is_inside = column < IN
        x_block = tl.load(
            x + row[:, None] * x_stride + column[None, :],
            mask=is_used[:, None] & is_inside[None, :],
            other=0.0,
        )
        a_block = tl.load(
            a + plane * (IN * PLANE) + column[:, None] * PLANE + rank[None, :],
            mask=is_inside[:, None],
            other=0.0,
        )
        if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly
            x_block = x_block.to(tl.float32)
            a_block = a_block.to(tl.float32)
        total = tl.dot(x_block, a_block, total, input_precision="ieee")
    use = (first + term).to(tl.int64) + chunk.to(tl.int64) * n
    tl.store(y + use[:, None] * PLANE + rank[None, :], total, mask=is_used[:, None])


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _expand_kernel(  # type: ignore[no-untyped-def]
    out, out_stride, y, n, b, rows, planes, scales, firsts, lengths,
    OUT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PLANE: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, block of outputs): all uses of 16 rows, added to the rows once."""
    tile = tl.program_id(0)
    column = tl.arange(0, BLOCK) + tl.program_id(1) * BLOCK
    is_inside = column < OUT
    first = tl.load(firsts + tile * LANES + tl.arange(0, LANES))
    is_used = first >= 0
    first_of_tile = tl.load(firsts + tile * LANES)
    rank = tl.arange(0, PLANE)
    change = tl.full((LANES, BLOCK), 0.0, tl.float32)
    for term in range(0, tl.load(lengths + tile)):
        use = (first + term).to(tl.int64)
        shrunk = tl.full((LANES, PLANE), 0.0, tl.float32)
        for chunk in tl.static_range(CHUNKS):
            at = y + (use + n.to(tl.int64) * chunk)[:, None] * PLANE + rank[None, :]
            shrunk += tl.load(at, mask=is_used[:, None], other=0.0)
        shrunk *= tl.load(scales + use, mask=is_used, other=0.0)[:, None]
        plane = tl.load(planes + first_of_tile + term).to(tl.int64)
        b_block = tl.load(
            b + plane * (PLANE * OUT) + rank[:, None] * OUT + column[None, :],
            mask=is_inside[None, :],
            other=0.0,
        )
        change = tl.dot(shrunk, b_block.to(tl.float32), change, input_precision=PRECISION)
    row = tl.load(rows + first, mask=is_used, other=0).to(tl.int64)
    at = out + row[:, None] * out_stride + column[None, :]
    is_ours = is_used[:, None] & is_inside[None, :]
    result = tl.load(at, mask=is_ours, other=0.0).to(tl.float32) + change
    tl.store(at, result.to(out.dtype.element_ty), mask=is_ours)


def _chunks(in_features: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(chunks, inputs per chunk, inputs per block of `_shrink_kernel`)."""
    block = 32 if dtype == torch.float32 else 256
    num_chunks = -(-in_features // CHUNK)
    per_chunk = -(-in_features // num_chunks)
    return num_chunks, -(-per_chunk // block) * block, block


def _precision(dtype: torch.dtype) -> str:
    """Of B's values: those of 16 bit are exact in TF32, so three products of it with y in two parts give float32."""
    return "ieee" if dtype == torch.float32 else "tf32x3"
