"""Tensors where they lie: as the safetensors library reads them, valid after release, converted when wanted so."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cadenza.models.errors import ModelError
from cadenza.models.weights import SAFETENSORS_DTYPES, FileWeights, Place, tensors_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def example(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(3, 5) < 0.5
    if dtype in INTEGERS:
        return torch.randint(0, 100, (3, 5)).to(dtype)
    return torch.randn(3, 5).to(dtype)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that together hold every type, a number, a tensor of no elements, and odd lengths in between."""
    tensors = {str(dtype): example(dtype) for dtype in SAFETENSORS_DTYPES.values()}
    tensors |= {
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 7),
        "odd": torch.ones(3, dtype=torch.int8),
    }
    names = sorted(tensors)
    found = []
    for number, part in enumerate((names[:7], names[7:])):
        found.append(tmp_path / f"{number}.safetensors")
        save_file({name: tensors[name] for name in part}, found[-1])
    return found


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_every_type_is_read_as_safetensors_reads_it(files: list[Path]) -> None:
    weights = FileWeights.of_safetensors(files)
    seen = 0
    for file in files:
        with safe_open(file, framework="pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118
                expected, actual = theirs.get_tensor(name), weights[name]
                assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
                assert bits(actual) == bits(expected), name
                assert weights.num_bytes(name) == expected.nbytes
                seen += 1
    assert seen == len(weights) == len(set(weights))


def test_what_was_handed_out_stays_valid(files: list[Path]) -> None:
    weights = FileWeights.of_safetensors(files)
    weights.read_ahead(weights)
    kept = {name: weights[name] for name in weights}
    before = {name: bits(tensor) for name, tensor in kept.items()}
    weights.release()
    assert {name: bits(tensor) for name, tensor in kept.items()} == before
    weights.release()
    assert {name: bits(weights[name]) for name in weights} == before


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_converted_and_unaligned(wanted: torch.dtype, shift: int, tmp_path: Path) -> None:
    expected = example(torch.bfloat16)
    file = tmp_path / "raw"
    file.write_bytes(b"x" * shift + bytes(bits(expected)))
    place = Place(file, shift, torch.bfloat16, (3, 5), wanted)
    weights = FileWeights({"a": place, "tied": place}, {"kept": torch.ones(2)})
    assert torch.equal(weights["a"], expected.to(wanted))
    assert torch.equal(weights.as_stored("a"), expected)
    assert weights.num_bytes("a") == 15 * wanted.itemsize
    assert weights.identity("a") == weights.identity("tied") != weights.identity("kept")
    assert torch.equal(weights["kept"], torch.ones(2))


def test_types_that_torch_cannot_compute_with_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b'{"strange":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ModelError, match=r"holds strange as F8_E8M0, which cannot be read here"):
        tensors_of(file)


def test_a_damaged_header_is_told(files: list[Path]) -> None:
    raw = bytearray(files[0].read_bytes())
    raw[8] ^= 0xFF
    files[0].write_bytes(raw)
    with pytest.raises(ModelError, match="is damaged"):
        FileWeights.of_safetensors(files)
