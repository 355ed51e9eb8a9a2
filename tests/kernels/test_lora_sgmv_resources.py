"""What the compiled kernels need of a GPU, without one: Triton brings the compilers, for any architecture.

Launches are recorded from the functions themselves, with tensors that have no data, so that what is compiled here is
what would be launched. A kernel that no longer fits its row of the table has changed its speed; whoever changes one
measures again.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cadenza.kernels.lora_segments import segment

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cadenza.kernels import lora_sgmv

SEGMENTS = segment(np.arange(40), np.arange(40) // 20, None, torch.device("cpu"))
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


class Need(NamedTuple):
    registers: int
    """Per thread, measured with Triton 3.9.0. Other versions may take a quarter more."""
    shared: int
    """Bytes per program."""
    copies: str
    """An instruction that shows that memory is read 16 bytes at a time, before it is needed."""
    products: str
    """The instruction that multiplies."""
    num_products: int
    """How many of it."""


def shrink(dtype: torch.dtype) -> None:
    """Of Llama 3 8B's down projection, seven chunks."""
    x, a = empty(40, 14336, dtype), empty(2 * 14336, 16, dtype)
    lora_sgmv.shrink(x, a, SEGMENTS)


def expand(dtype: torch.dtype) -> None:
    """Of its up projection, from two chunks."""
    y = torch.empty(2, 40, 16, device="meta")
    lora_sgmv.expand_(empty(40, 14336, dtype), y, empty(2 * 16, 14336, dtype), SEGMENTS)


def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


COPY, TENSOR_CORE, PLAIN = r"LDGSTS\.E\.\S*128", r"\bHMMA\.", r"\bFFMA\b"

# expand's 48 are three for each product of float32 by 16 bit, without which it would be of TF32's accuracy.
NEEDS = {
    (80, shrink, torch.bfloat16): Need(72, 32768, COPY, TENSOR_CORE, 16),
    (80, expand, torch.bfloat16): Need(95, 10304, COPY, TENSOR_CORE, 48),
    (90, shrink, torch.bfloat16): Need(80, 32768, COPY, TENSOR_CORE, 16),
    (90, expand, torch.bfloat16): Need(95, 10304, COPY, TENSOR_CORE, 48),
    (90, shrink, torch.float32): Need(32, 8192, COPY, PLAIN, 128),
    (90, expand, torch.float32): Need(108, 19520, COPY, PLAIN, 512),
}


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments, self.options = arguments, options

        return launch

    def compiled(self, architecture: int) -> Any:
        """As Triton specializes a launch: pointers and integers that are multiples of 16 are known to be."""
        signature, constants, attributes = {}, {}, {}
        for number, (parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
            if is_tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)


def dump(cubin: Path, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(
    ("architecture", "product", "dtype"), NEEDS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_kernel_compiles_without_spilling_to_what_the_table_says(
    architecture, product, dtype, monkeypatch, tmp_path
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or it would be found compiled by another version
    name = "_shrink_kernel" if product is shrink else "_expand_kernel"
    recorder = Recorder(getattr(lora_sgmv, name))
    monkeypatch.setattr(lora_sgmv, name, recorder)
    product(dtype)
    compiled = recorder.compiled(architecture)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump(cubin, "--dump-resource-usage"))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    code = dump(cubin, "--dump-sass")
    need = NEEDS[architecture, product, dtype]
    assert (stack, local) == (0, 0)
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert registers <= need.registers * (1 if triton.__version__ == "3.9.0" else 1.25)
    assert compiled.metadata.shared <= need.shared
    assert re.search(need.copies, code)
    assert len(re.findall(need.products, code)) == need.num_products
    assert not re.search(r"\bHGMMA\b", code)  # sums in another order than HMMA, so never for some tiles only
