"""4-bit integers in 32-bit words, as `int4_matmul` reads them on a GPU: packing, and reading back in plain torch.

Word c of output n and of the 128 inputs from 128 t on, [t, n, c], has at bits 4j and 16 + 4j, j from 0 to 3, the
integers of the inputs 128 t + 32 j + 2 c and the next one, and is then turned left by 3 bits. Works on any device, on
some outputs at a time as well as on all. Knows nothing of Triton, of modules or of how integers are chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Inputs whose words lie together."""
WORDS = 16
"""Of each chunk and output."""
_SLICES = 4
_TURN = 3


def pack(integers: Tensor) -> Tensor:
    """integers: [n, k] uint8, 0 to 15. [ceil(k / 128), n, 16] int32; what is beyond k is 0."""
    padded = F.pad(integers, (0, -integers.shape[1] % CHUNK))
    # [n, t, j, c, low or high]
    parts = padded.view(len(padded), padded.shape[1] // CHUNK, _SLICES, WORDS, 2).to(torch.int32)
    words = torch.zeros(*parts.shape[:2], WORDS, dtype=torch.int32, device=parts.device)
    for j in range(_SLICES):
        words |= parts[:, :, j, :, 0] << (4 * j)
        words |= parts[:, :, j, :, 1] << (16 + 4 * j)
    return _turned(words, _TURN).transpose(0, 1).contiguous()


def unpack(words: Tensor) -> Tensor:
    """[n, 128 t] uint8 from [t, n, 16] int32."""
    plain = _turned(words, 32 - _TURN).transpose(0, 1)
    parts = [torch.stack((plain >> (4 * j), plain >> (16 + 4 * j)), -1) & 15 for j in range(_SLICES)]
    return torch.stack(parts, 2).to(torch.uint8).view(words.shape[1], len(words) * CHUNK)


def dequantize_reference(
    words: Tensor, scales_and_zeros: Tensor, group_size: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[n, width] in dtype (float64 for a truth): (q - 8) * scale + zero. scales_and_zeros: [groups, n, 2]."""
    groups = -(-width // group_size)
    integers = unpack(words)[:, : groups * group_size].unflatten(1, (groups, group_size))
    scales, zeros = scales_and_zeros[:groups].to(dtype).permute(2, 1, 0)[..., None]
    weight: Tensor = ((integers.to(dtype) - 8) * scales + zeros).flatten(1)
    return weight[:, :width]


def _turned(words: Tensor, count: int) -> Tensor:
    """Bits turned left by `count`, 1 to 31; shifts to the right of negative numbers bring ones, which are masked."""
    return (words << count) | ((words >> (32 - count)) & ((1 << count) - 1))
