"""The write into the paged cache against indexing, in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cadenza.kernels import kv_write

CASES = {
    "as Llama": (16, 8, 128, 128, torch.bfloat16),
    "as SmolLM2": (16, 3, 64, 64, torch.float32),
    "odd sizes, values smaller": (32, 5, 80, 20, torch.float16),
    "more heads than one program takes": (16, 40, 192, 128, torch.bfloat16),
    "one of everything": (1, 1, 1, 1, torch.float32),
}
NUM_BLOCKS = 6


def cache_of(triton_interpreter, case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    block_size, heads, key_dim, value_dim, dtype = CASES[case]
    keys, values = (
        triton_interpreter.poisoned(NUM_BLOCKS, block_size, heads, dim, dtype=dtype, device=str(device))
        for dim in (key_dim, value_dim)
    )
    return keys, values


def rows_of(case: str, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """slots, with padding, key and value: views of a projection to queries, keys and values of all heads."""
    block_size, heads, key_dim, value_dim, dtype = CASES[case]
    generator = torch.Generator().manual_seed(num_rows)
    slots = torch.randperm(NUM_BLOCKS * block_size, generator=generator)[:num_rows]
    slots[1::3] = -1
    projection = torch.randn(num_rows, 16 + heads * (key_dim + value_dim), generator=generator).to(dtype)
    projection[slots < 0] = torch.nan
    key, value = projection[:, 16:].to(device).split([heads * key_dim, heads * value_dim], dim=1)
    return slots.to(device), key.unflatten(1, (heads, -1)), value.unflatten(1, (heads, -1))


def truth(cache: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    result = cache.clone()
    for number, slot in enumerate(slots.tolist()):
        if slot >= 0:
            result[slot // cache.shape[1], slot % cache.shape[1]] = rows[number]
    return result


def is_same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )


@pytest.mark.parametrize("write", [kv_write.write_kv, kv_write.write_kv_reference])
@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("case", CASES)
def test_rows_stand_in_their_slots_and_nothing_else_changes(
    case, num_rows, write, kernel_device, triton_interpreter
):
    slots, key, value = rows_of(case, num_rows, kernel_device)
    keys, values = cache_of(triton_interpreter, case, kernel_device)
    expected = truth(keys, slots, key), truth(values, slots, value)
    write(keys, values, slots, key, value)
    assert is_same(keys, expected[0])
    assert is_same(values, expected[1])
    assert int((~keys.isnan()).sum()) == int((slots >= 0).sum()) * key[0].numel()


def test_heads_may_come_before_rows_and_the_cache_may_be_part_of_something(kernel_device, triton_interpreter):
    """[Hkv, T, D] transposed, and keys and values of a block side by side in one tensor."""
    slots, key, value = rows_of("as SmolLM2", 5, kernel_device)
    both = triton_interpreter.poisoned(NUM_BLOCKS, 2, 16, 3, 64, device=str(kernel_device))
    expected = truth(both[:, 0], slots, key), truth(both[:, 1], slots, value)
    by_head = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (key, value)]
    kv_write.write_kv(both[:, 0], both[:, 1], slots, *by_head)
    assert is_same(both[:, 0], expected[0])
    assert is_same(both[:, 1], expected[1])


def test_without_rows_nothing_happens(kernel_device, triton_interpreter):
    keys, values = cache_of(triton_interpreter, "as SmolLM2", kernel_device)
    kv_write.write_kv(keys, values, *rows_of("as SmolLM2", 0, kernel_device))
    assert keys.isnan().all()
    assert values.isnan().all()


def test_the_bytes_that_must_move():
    """Llama 3 8B: 4 KB of a token in a layer, read and written, and its slot."""
    assert kv_write.write_kv_bytes(256, 8, 128, 128, torch.bfloat16) == 256 * (2 * 4096 + 8)
