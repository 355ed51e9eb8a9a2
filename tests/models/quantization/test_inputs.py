"""What every kind of quantized layer makes of rows that do not lie one after the other in memory, and of none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cadenza.models.quantization.base import QuantizedLinear
from cadenza.models.quantization.methods import method_named

DTYPES = (torch.float32, torch.bfloat16)


def prepared(name: Any, dtype: torch.dtype) -> QuantizedLinear:
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    method = method_named(name, 32, torch.device("cpu"))
    assert method is not None
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    layer = method.layer(64, 96, has_bias=False, dtype=dtype)
    for part, tensor in method.quantize(weight).items():
        layer._buffers[part] = tensor
    layer.prepare()
    return layer


def strided(dtype: torch.dtype) -> dict[str, Tensor]:
    values = torch.randn(64, 130, generator=torch.Generator().manual_seed(2)).to(dtype)
    return {
        "transposed": values[:, :5].T,
        "transposed, in a batch": values[None, :, :5].transpose(1, 2),
        "columns of wider rows": values[:5, 3:67],
        "every other column": values[:5, 1:129:2],
        "every other row": values[:10:2, :64],
        "one row, repeated": values[:1, :64].expand(5, 64),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8", "llm-int8"])
@torch.inference_mode()
def test_how_rows_lie_in_memory_makes_no_difference(name: str, dtype: torch.dtype) -> None:
    layer = prepared(name, dtype)
    for how, x in strided(dtype).items():
        assert not x.is_contiguous(), how
        assert torch.equal(layer(x), layer(x.contiguous())), how


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8", "llm-int8"])
@torch.inference_mode()
def test_no_rows_give_no_rows(name: str) -> None:
    assert prepared(name, torch.float32)(torch.empty(2, 0, 64)).shape == (2, 0, 96)
